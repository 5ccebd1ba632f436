// Norms of the heads of queries and keys and their rotation by the position, one pass each way. Of
// every head x [E] of a token, with n = x / sqrt(mean(x^2) + eps) * weight, or n = x where there
// are no norms, entry i < half pairs with entry i + half:
//
//   y_i        = n_i cos_i - n_{i + half} sin_i
//   y_{i+half} = n_i sin_i + n_{i + half} cos_i
//
// and the other E - 2 half entries pass through. float64, float32, bfloat16 or float16; computed in
// float32 (float64 for float64) and rounded once. The backward makes the norms' factors again:
// queries and keys are all that is kept, and without norms nothing is. The function goes through
// the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "../../macros.h"

namespace muddformer {

/// Norms and rotates queries and keys.
///
/// @param q queries [B, T, H, E], as the projection leaves them; a slice of a wider one too.
/// @param k keys [B, T, Hk, E] of the dtype and device of q; Hk may be another number of heads.
/// @param cos of the T positions, float32 [T, half] or [1, T, half] or, where each sequence has
///   positions of its own, [B, T, half], half <= E / 2. It gets no gradient.
/// @param sin likewise.
/// @param q_weight of the RMSNorm of q, [E], of the dtype of q or float32; nullopt: no norms.
/// @param k_weight of that of k, given together with q_weight.
/// @param eps added to the mean square, at least 0.
/// @return queries and keys of the shapes that came, contiguous. Attention takes them as
///   transpose(1, 2): its result has the order of its queries in memory, so that it can be
///   flattened without a copy.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API std::tuple<at::Tensor, at::Tensor> qk_norm_rotary(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    const std::optional<at::Tensor>& q_weight = std::nullopt,
    const std::optional<at::Tensor>& k_weight = std::nullopt, double eps = 1e-6);

}  // namespace muddformer
