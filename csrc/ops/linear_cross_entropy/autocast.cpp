// Under autocast the hidden states take the autocast dtype. The head is cast inside the operator,
// whose gradient of it is then the parameter's own, never rounded to 16 bits in between; a head of
// 16 bits takes the autocast dtype.
#include "../common/autocast.h"

#include "internal.h"

namespace muddformer::detail {
namespace {

at::Tensor cast_and_call(const AutocastCasts& casts, const at::Tensor& hidden,
                         const at::Tensor& weight, const at::Tensor& targets,
                         const std::optional<at::Tensor>& bias, std::string_view reduction,
                         const TokenLossOptions& options) {
  const auto is_float32 = [](const at::Tensor& tensor) {
    return !tensor.defined() || tensor.scalar_type() == at::kFloat;
  };
  const at::Tensor narrow = hidden.defined() ? casts.narrow(hidden) : hidden;
  return linear_cross_entropy(narrow, is_float32(weight) ? weight : casts.narrow(weight), targets,
                              bias && !is_float32(*bias) ? casts.narrow(bias) : bias,
                              std::string(reduction), options);
}

const AutocastLibrary library = AutocastLibrary().impl<cast_and_call>("linear_cross_entropy");

}  // namespace
}  // namespace muddformer::detail
