// Under autocast the branch and the normed tensor take the autocast dtype, the residual stream and
// the norm's parameters stay as they are.
#include "../common/autocast.h"

#include "internal.h"

namespace muddformer::detail {
namespace {

std::tuple<at::Tensor, at::Tensor> cast_and_call(const AutocastCasts& casts, const at::Tensor& x,
                                                 const at::Tensor& residual,
                                                 const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias,
                                                 const AddNormOptions& options) {
  const at::Tensor narrow = casts.narrow(x);
  AddNormOptions chosen = options;
  if (!chosen.dtype.has_value()) chosen.dtype = narrow.scalar_type();
  return add_norm(narrow, residual, weight, bias, chosen);
}

const AutocastLibrary library = AutocastLibrary().impl<cast_and_call>("add_norm");

}  // namespace
}  // namespace muddformer::detail
