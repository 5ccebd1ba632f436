// Residual addition and norm on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {
namespace {

AddNormForward add_norm_forward_cpu(const at::Tensor& x, const at::Tensor& residual,
                                    const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                    const AddNormOptions& options) {
  check_add_norm(x, residual, weight, bias, options);
  return add_norm_composition(x, residual, weight, bias, options);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward_cpu(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& grad_normed, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& mean, std::string_view norm,
    at::ScalarType x_dtype, std::array<bool, 2> wanted) {
  check_add_norm_backward(grad_sum, grad_normed, sum, weight, rstd, mean, norm, x_dtype, wanted);
  return add_norm_backward_composition(grad_sum, grad_normed, sum, weight, rstd, mean, norm,
                                       x_dtype, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("add_norm_forward", flat<add_norm_forward_cpu>);
  m.impl("add_norm_backward", add_norm_backward_cpu);
}

}  // namespace muddformer::detail
