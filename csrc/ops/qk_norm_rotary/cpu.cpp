// Norms of heads and rotation on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {
namespace {

std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_cpu(const at::Tensor& q, const at::Tensor& k,
                                                      const at::Tensor& cos, const at::Tensor& sin,
                                                      const std::optional<at::Tensor>& q_weight,
                                                      const std::optional<at::Tensor>& k_weight,
                                                      double eps) {
  check_qk_norm_rotary(q, k, cos, sin, q_weight, k_weight, eps);
  return qk_norm_rotary_composition(q, k, cos, sin, q_weight, k_weight, eps);
}

QkGradients qk_norm_rotary_backward_cpu(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                        const std::optional<at::Tensor>& q,
                                        const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                        const at::Tensor& sin,
                                        const std::optional<at::Tensor>& q_weight,
                                        const std::optional<at::Tensor>& k_weight, double eps,
                                        std::array<bool, 2> wanted) {
  check_qk_norm_rotary_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, eps, wanted);
  return qk_norm_rotary_backward_composition(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight,
                                             eps, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("qk_norm_rotary", qk_norm_rotary_cpu);
  m.impl("qk_norm_rotary_backward", qk_norm_rotary_backward_cpu);
}

}  // namespace muddformer::detail
