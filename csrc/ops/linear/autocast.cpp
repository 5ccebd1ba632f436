// Under autocast x takes the autocast dtype, and the product reads the copies of weight and bias
// that autocast makes once for a forward; their gradients go past the copies to the parameters,
// without being rounded. The residual stays as it is.
#include "../common/autocast.h"

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

at::Tensor cast_and_call(const AutocastCasts& casts, const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& residual) {
  check_defined(x, {"x"});
  check_defined(weight, {"weight"});
  const at::Tensor narrow = casts.narrow(x);
  // A parameter of another 16 bits becomes one of the autocast dtype; float32 stays what it is.
  const auto own = [&](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat ? t : casts.narrow(t);
  };
  const auto own_bias = bias && bias->defined() ? std::optional(own(*bias)) : std::nullopt;
  return linear_of_copies(narrow, own(weight), own_bias, residual, casts.narrow(weight).detach(),
                          own_bias ? std::optional(casts.narrow(*bias).detach()) : std::nullopt);
}

const AutocastLibrary library = AutocastLibrary().impl<cast_and_call>("linear");

}  // namespace
}  // namespace muddformer::detail
