// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_meta(const at::Tensor& q, const at::Tensor& k,
                                                       const at::Tensor& cos, const at::Tensor& sin,
                                                       const std::optional<at::Tensor>& q_weight,
                                                       const std::optional<at::Tensor>& k_weight,
                                                       double eps) {
  check_qk_norm_rotary(q, k, cos, sin, q_weight, k_weight, eps);
  return {empty_of(q), empty_of(k)};
}

QkGradients qk_norm_rotary_backward_meta(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                         const std::optional<at::Tensor>& q,
                                         const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                         const at::Tensor& sin,
                                         const std::optional<at::Tensor>& q_weight,
                                         const std::optional<at::Tensor>& k_weight, double eps,
                                         std::array<bool, 2> wanted) {
  check_qk_norm_rotary_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, eps, wanted);
  const at::Tensor& like = q_weight.has_value() ? *q_weight : grad_q;
  const auto of_weight = [&](bool is_wanted) {
    return is_wanted ? empty_of(like) : empty_none(like);
  };
  return {empty_of(grad_q), empty_of(grad_k), of_weight(wanted[0]), of_weight(wanted[1])};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("qk_norm_rotary", qk_norm_rotary_meta);
  m.impl("qk_norm_rotary_backward", qk_norm_rotary_backward_meta);
}

}  // namespace muddformer::detail
