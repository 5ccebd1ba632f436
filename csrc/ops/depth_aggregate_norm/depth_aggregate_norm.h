// Aggregation of hidden states over depth whose streams are normed while they are made, as the
// attention of the next block reads them (arXiv 2502.12170, section 2 and Eq. 10):
//
//   mix_c = sum_j weights[..., c, j] * X_j[..., :],   c = 0..C-1, j = 0..S-1
//   Y_c   = norm_c(base + mix_c)                      a way with a norm weight
//         = base + mix_c                              a way without
//         = base + RMSNorm(mix_c) * post_weight       the last way, if there is a post weight
//
// base is the newest source X_{S-1} where it is to be added (PostDANorm), otherwise 0. With a pre
// weight (PreDANorm) the newest source joins the others as RMSNorm(X_{S-1}) * pre_weight.
// norm is "rms", v / sqrt(mean(v^2) + eps) * weight, or "layer", which also subtracts the mean of v
// and adds a bias.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../../macros.h"
#include "../common/norms.h"
#include "../deferred_flush/deferred_flush.h"

namespace muddformer {

/// Weighted sums of hidden states over depth, normed; the sources are handed on for chained
/// gradients as by depth_aggregate_chained(), the newest one normed if there is a pre weight.
///
/// On CUDA (compute capability 9.0 or later) norms cost no pass of their own, forward or backward:
/// the sums are normed before they are rounded.
///
/// @param hiddens the S >= 1 sources X_j, each [..., D], of one shape, dtype and device.
/// @param weights connection weights [..., C, S], C >= 1.
/// @param norms of the ways, of the newest hidden state and of the last way's sum.
/// @param deferral as in depth_aggregate_chained(); with add_newest or pre_weight of fewer than S
///   hidden states.
/// @return (the C streams, the S hidden states to be used from here on).
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>
depth_aggregate_norm_chained(at::TensorList hiddens, const at::Tensor& weights,
                             const StreamNorms& norms, const Deferral& deferral = {});

/// Whether one kernel makes the sums of depth_aggregate_norm_chained() and their norms. Where it
/// does not (a CPU build, the CPU, float64, devices before compute capability 9.0 or without code
/// for it in this build, sizes beyond the kernel's), the operator makes them of several steps in
/// float32 and modules of their own are the better choice. It says so of the forward: the backward
/// of rows too wide for the sums of the norms' gradients in shared memory (beyond about 8192
/// entries with three LayerNorms with biases, 16384 with three RMSNorms) is composed.
///
/// @param x a hidden state [..., D]; its device, dtype and D are what counts, so that it may be
///   fake. D has to be a multiple of 8 in every dtype: autocast may make float32 one of 16 bits.
/// @param sources number of hidden states S.
/// @param ways number of ways C.
MUDDFORMER_API bool fuses_norms(const at::Tensor& x, int64_t sources, int64_t ways);

}  // namespace muddformer
