// What the operator's backends know of SwiGLU's product.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "swiglu.h"

namespace muddformer::detail {

/// Gradients of gate and up. Without up that of both side by side, and a tensor [0].
std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                   const std::optional<at::Tensor>& up);

void check_swiglu(const at::Tensor& gate, const std::optional<at::Tensor>& up);
void check_swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                           const std::optional<at::Tensor>& up);

// Sizes of the result.
inline c10::SymDimVector swiglu_sizes(const at::Tensor& gate, bool fused) {
  c10::SymDimVector sizes(gate.sym_sizes().begin(), gate.sym_sizes().end());
  if (fused) sizes.back() = sizes.back() / 2;
  return sizes;
}

}  // namespace muddformer::detail
