// Under autocast queries and keys take the autocast dtype, which projections leave them in anyway;
// tables and weights stay as they are, weights of 16 bits take the autocast dtype too.
#include "../common/autocast.h"

#include "qk_norm_rotary.h"

namespace muddformer::detail {
namespace {

std::tuple<at::Tensor, at::Tensor> cast_and_call(const AutocastCasts& casts, const at::Tensor& q,
                                                 const at::Tensor& k, const at::Tensor& cos,
                                                 const at::Tensor& sin,
                                                 const std::optional<at::Tensor>& q_weight,
                                                 const std::optional<at::Tensor>& k_weight,
                                                 double eps) {
  const auto fitting = [&casts](const std::optional<at::Tensor>& weight) {
    return weight && weight->scalar_type() != at::kFloat ? casts.narrow(weight) : weight;
  };
  return qk_norm_rotary(casts.narrow(q), casts.narrow(k), cos, sin, fitting(q_weight),
                        fitting(k_weight), eps);
}

const AutocastLibrary library = AutocastLibrary().impl<cast_and_call>("qk_norm_rotary");

}  // namespace
}  // namespace muddformer::detail
