// SwiGLU's product of gate and value, one pass each way:
//
//   y = silu(gate) * up,  silu(g) = g / (1 + exp(-g))
//
// The backward makes silu(gate) again: gate and up are all that is kept. gate and up are [..., F],
// of float64, float32, bfloat16 or float16; computed in float32 (float64 for float64) and rounded
// once. The function goes through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../../macros.h"

namespace muddformer {

/// silu(gate) * up.
///
/// @param gate [..., F]. Without up: [..., 2 F], gate and up side by side, as one product of both
///   weights leaves them; their gradient is one tensor too.
/// @param up of the shape, dtype and device of gate, or nullopt.
/// @return [..., F], contiguous, in the dtype of gate.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API at::Tensor swiglu(const at::Tensor& gate,
                                 const std::optional<at::Tensor>& up = std::nullopt);

}  // namespace muddformer
