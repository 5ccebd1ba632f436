// PyTorch's steps for SwiGLU's product, those that autograd takes where it is written out.
#pragma once

#include <ATen/ATen.h>

#include "internal.h"

namespace muddformer::detail {

struct GateAndUp {
  at::Tensor gate, up;
};

inline GateAndUp gate_and_up(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  if (up.has_value()) return {gate, *up};
  const int64_t width = gate.size(-1) / 2;
  return {gate.narrow(-1, 0, width), gate.narrow(-1, width, width)};
}

inline at::Tensor swiglu_composition(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  const GateAndUp given = gate_and_up(gate, up);
  return (at::silu(given.gate) * given.up).contiguous();
}

inline std::tuple<at::Tensor, at::Tensor> swiglu_backward_composition(
    const at::Tensor& grad, const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  const GateAndUp given = gate_and_up(gate, up);
  const at::Tensor grad_gate = at::silu_backward(grad * given.up, given.gate).contiguous();
  const at::Tensor grad_up = (grad * at::silu(given.gate)).contiguous();
  if (up.has_value()) return {grad_gate, grad_up};
  return {at::cat({grad_gate, grad_up}, -1), at::empty({0}, gate.options())};
}

}  // namespace muddformer::detail
