// How the generator makes connection weights: what there is beside its matrices.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace muddformer {

/// Options of connection_weights().
struct GeneratorOptions {
  /// Weight [D] of the RMSNorm, of the dtype of x or float32; nullopt: a norm without one.
  std::optional<at::Tensor> scale = std::nullopt;
  /// Added to the mean square in the norm, at least 0.
  double eps = 1e-6;
  /// "none" (erf form) or "tanh".
  std::string gelu_approximate = "none";
  /// Positive bound of the weights, cap * tanh(A / cap); nullopt: no bound.
  std::optional<double> cap = std::nullopt;
};

}  // namespace muddformer
