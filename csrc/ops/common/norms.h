// The norms of the streams that an aggregation makes: one object for everything that says how.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

namespace muddformer {

/// A tensor or none for each of several places.
using OptionalTensors = c10::List<std::optional<at::Tensor>>;

/// How the streams of C ways are normed, see depth_aggregate_norm_chained().
struct StreamNorms {
  /// "rms" (RMSNorm), "layer" (LayerNorm), or "none" where no way has a norm weight.
  std::string kind = "none";
  /// Added to the mean square or the variance in every norm, at least 0.
  double eps = 1e-6;
  /// C weights [D], none for a way without a norm; or an empty list. All weights and biases of
  /// norms are of one dtype, that of the hidden states or float32.
  OptionalTensors weights{};
  /// C biases [D], none for a norm without; or an empty list.
  OptionalTensors biases{};
  /// Whether the newest hidden state, as it came, is added to every way before its norm.
  bool add_newest = false;
  /// Weight [D] of the RMSNorm of the newest hidden state before it is mixed; nullopt: no norm.
  std::optional<at::Tensor> pre_weight = std::nullopt;
  /// Weight [D] of the RMSNorm of the last way's sum before the newest hidden state is added; needs
  /// add_newest, and none as the last way's norm weight.
  std::optional<at::Tensor> post_weight = std::nullopt;
};

}  // namespace muddformer
