// A linear layer on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {
namespace {

at::Tensor linear_forward_cpu(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<at::Tensor>& bias,
                              const std::optional<at::Tensor>& residual) {
  check_linear(x, weight, bias, residual, /*casts=*/false);
  return linear_composition(x, weight, bias, residual);
}

LinearGradients linear_backward_cpu(const at::Tensor& grad, const at::Tensor& x,
                                    const at::Tensor& weight, at::ScalarType dtype,
                                    std::array<bool, 3> wanted) {
  check_linear_backward(grad, x, weight, dtype);
  return linear_backward_composition(grad, x, weight, dtype, wanted);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("linear_forward", linear_forward_cpu);
  m.impl("linear_backward", linear_backward_cpu);
}

}  // namespace muddformer::detail
