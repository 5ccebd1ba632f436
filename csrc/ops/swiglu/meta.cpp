// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

at::Tensor swiglu_meta(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  check_swiglu(gate, up);
  return at::empty_symint(swiglu_sizes(gate, !up.has_value()), gate.options());
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_meta(const at::Tensor& grad,
                                                        const at::Tensor& gate,
                                                        const std::optional<at::Tensor>& up) {
  check_swiglu_backward(grad, gate, up);
  return {empty_of(gate), empty_of(up, gate)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("swiglu", swiglu_meta);
  m.impl("swiglu_backward", swiglu_backward_meta);
}

}  // namespace muddformer::detail
