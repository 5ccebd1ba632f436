// The head of a language model and its loss together. With the logits x = hidden W^T + b of a
// token, V of them, and its target y:
//
//   lse  = log sum_v exp(x_v)
//   loss = lse - (1 - s) x_y - s / V sum_v x_v + z lse^2
//
// s is the label smoothing, z the weight of the z-loss. Tokens are taken in chunks, so that the
// logits of all tokens are never in memory at once; and the gradients of a chunk are made while its
// logits are there, so that no product of the head is computed twice.
//
// hidden is [..., D], W [V, D], b [V], the targets [...]. float64, float32, bfloat16 or float16; W
// and b may be float32 beside any of them, are then cast for the products, and have gradients which
// were never rounded to 16 bits. Sums, losses and the gradient of W over the chunks are float32
// (float64 for float64). The functions go through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "../../macros.h"

namespace muddformer {

/// How the loss of a token is computed, see linear_cross_entropy().
struct TokenLossOptions {
  /// Tokens of this target do not count: their loss is 0.
  int64_t ignore_index = -100;
  /// From 0 to 1: the part of the target's probability that all V classes share.
  double label_smoothing = 0;
  /// Weight of the square of log sum exp of the logits, at least 0.
  double z_loss = 0;
  /// Tokens whose logits are in memory at once; nullopt: so many that these are about 512 MiB (64
  /// MiB on a CPU).
  std::optional<int64_t> chunk = std::nullopt;
};

/// Cross-entropy of the tokens' targets under the logits `hidden weight^T + bias`.
///
/// "mean" and "sum" compute the gradients in the forward and keep them for the backward, in float32
/// (float64 for float64). "none" computes the logits again in the backward, because the losses'
/// gradients are not known before.
///
/// @param hidden hidden states [..., D].
/// @param weight head [V, D], of the dtype of hidden or float32.
/// @param targets classes [...], int64 or int32, from 0 to V - 1, or ignore_index.
/// @param bias [V], of the dtype of hidden or float32; nullopt: none.
/// @param reduction "mean" over the tokens that count (0 if none does, with gradients of 0), "sum",
///   or "none": the losses of all tokens [...].
/// @return float32 (float64 for float64).
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came;
///   c10::IndexError for a target that is no class (on CUDA: a device-side assertion).
MUDDFORMER_API at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                               const at::Tensor& targets,
                                               const std::optional<at::Tensor>& bias = std::nullopt,
                                               const std::string& reduction = "mean",
                                               const TokenLossOptions& options = {});

}  // namespace muddformer
