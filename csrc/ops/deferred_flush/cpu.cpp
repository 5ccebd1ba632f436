// Deferred gradients on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {
namespace {

std::vector<at::Tensor> deferred_flush_cpu(const OptionalTensors& grad_hiddens,
                                           const OptionalTensors& grad_sums,
                                           at::TensorList weights) {
  const at::Tensor like = check_deferred_flush(grad_hiddens, grad_sums, weights);
  return deferred_flush_composition(grad_hiddens, grad_sums, weights, like);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("deferred_flush", deferred_flush_cpu);
}

}  // namespace muddformer::detail
