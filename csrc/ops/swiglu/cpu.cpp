// SwiGLU's product on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {
namespace {

at::Tensor swiglu_cpu(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  check_swiglu(gate, up);
  return swiglu_composition(gate, up);
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_cpu(const at::Tensor& grad,
                                                       const at::Tensor& gate,
                                                       const std::optional<at::Tensor>& up) {
  check_swiglu_backward(grad, gate, up);
  return swiglu_backward_composition(grad, gate, up);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("swiglu", swiglu_cpu);
  m.impl("swiglu_backward", swiglu_backward_cpu);
}

}  // namespace muddformer::detail
