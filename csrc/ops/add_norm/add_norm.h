// Residual addition and the norm after it, one pass each way:
//
//   s = residual + x,  y = norm(s)
//   RMSNorm:   y = s / sqrt(mean(s^2) + eps) * weight
//   LayerNorm: y = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) * weight + bias
//
// x and the residual are [..., D]. The sum has the dtype of the residual, and the norm reads it
// rounded to that; the normed tensor has a dtype of its own: a residual stream of float32 with a
// branch of bfloat16 is normed in bfloat16. Computed in float32 (float64 for float64). The backward
// adds the gradient that the sum gets elsewhere to that of the norm. The function goes through the
// dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../../macros.h"

namespace muddformer {

/// How add_norm() norms the sum.
struct AddNormOptions {
  /// "rms" (RMSNorm) or "layer" (LayerNorm).
  std::string norm = "rms";
  /// Added to the mean square or the variance, at least 0.
  double eps = 1e-6;
  /// Of the normed tensor, that of x or of the residual; nullopt: that of the residual, under
  /// autocast the autocast dtype.
  std::optional<at::ScalarType> dtype = std::nullopt;
};

/// residual + x, and its norm.
///
/// @param x a branch [..., D], of the dtype of the residual, or of 16 bits beside a float32 one.
/// @param residual [..., D], float64, float32, bfloat16 or float16.
/// @param weight [D], of the dtype of the residual or float32.
/// @param bias of a LayerNorm: [D], of the dtype of the weight; nullopt: none.
/// @return (sum, normed), [..., D] each, contiguous.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API std::tuple<at::Tensor, at::Tensor> add_norm(
    const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
    const std::optional<at::Tensor>& bias = std::nullopt, const AddNormOptions& options = {});

}  // namespace muddformer
