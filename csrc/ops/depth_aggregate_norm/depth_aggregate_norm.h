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

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "../../macros.h"
#include "../deferred_flush/deferred_flush.h"

namespace muddformer {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

/// Weighted sums of hidden states over depth, normed; the sources are handed on for chained
/// gradients as by depth_aggregate_chained(), the newest one normed if there is a pre weight.
///
/// On CUDA (compute capability 9.0) norms cost no pass of their own, forward or backward: the sums
/// are normed before they are rounded.
///
/// @param hiddens the S >= 1 sources X_j, each [..., D], of one shape, dtype and device.
/// @param weights connection weights [..., C, S], C >= 1.
/// @param norm_weights C norm weights [D]; none: the way has no norm. All weights and biases of
/// norms
///   are of one dtype, that of the hidden states or float32.
/// @param norm_biases C biases [D]; none: no bias.
/// @param norm "rms" or "layer".
/// @param eps added to the mean square or the variance, at least 0.
/// @param add_newest whether hiddens[S-1], as it came, is added to every way.
/// @param pre_weight weight [D] of the RMSNorm of hiddens[S-1] before it is mixed; none: no norm.
/// @param post_weight weight [D] of the RMSNorm of the last way's sum before the newest source is
///   added; needs add_newest, and none as the last way's norm weight.
/// @param deferral as in depth_aggregate_chained(); with add_newest or pre_weight of fewer than S
///   hidden states.
/// @return (the C streams, the S hidden states to be used from here on).
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>
depth_aggregate_norm_chained(at::TensorList hiddens, const at::Tensor& weights,
                             const OptionalTensors& norm_weights,
                             const OptionalTensors& norm_biases, std::string_view norm, double eps,
                             bool add_newest, const std::optional<at::Tensor>& pre_weight,
                             const std::optional<at::Tensor>& post_weight,
                             const Deferral& deferral = {});

/// depth_aggregate_norm_chained() without gradients, and what its backward reads.
///
/// @return (streams, the newest source as it was mixed [..., D] with a pre weight and [0] without,
///   the last way's sum before its norm [..., D] with a post weight and [0] without,
///   statistics [2, C, N] of the N tokens: mean and 1 / sqrt(...) of every way, 0 and 1 where it
///   has no norm, float32 or float64; with a pre weight [2, C + 1, N], the newest source last).
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
depth_aggregate_norm_forward(at::TensorList hiddens, const at::Tensor& weights,
                             const OptionalTensors& norm_weights,
                             const OptionalTensors& norm_biases, std::string_view norm, double eps,
                             bool add_newest, const std::optional<at::Tensor>& pre_weight,
                             const std::optional<at::Tensor>& post_weight);

/// Gradients of depth_aggregate_norm_chained(), in one pass over the history.
///
/// @param grad_outputs C gradients of the streams; none stands for zero.
/// @param grad_hiddens S gradients of the handed-on sources (with a pre weight of the newest as it
///   was mixed); none stands for zero.
/// @param hiddens the sources as they came.
/// @param outputs, mix, statistics what the forward returned; [0] does for the output of a way
///   without a norm weight.
/// @param deferred number of the first hidden states that get no gradient here, with add_newest or
///   pre_weight fewer than S.
/// @return gradients of (the other hidden states, weights, norm weights, norm biases, pre weight,
///   post weight); [0] for each that was not given. Last, with deferred hidden states, the
///   gradients of what the ways with a norm norm (dV, deferred_flush.h), [0] for other ways and
///   without.
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>,
                          std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>>
depth_aggregate_norm_backward(const OptionalTensors& grad_outputs,
                              const OptionalTensors& grad_hiddens, at::TensorList hiddens,
                              const at::Tensor& weights, const OptionalTensors& norm_weights,
                              const OptionalTensors& norm_biases, std::string_view norm, double eps,
                              bool add_newest, const std::optional<at::Tensor>& pre_weight,
                              const std::optional<at::Tensor>& post_weight, at::TensorList outputs,
                              const at::Tensor& mix, const at::Tensor& statistics,
                              int64_t deferred = 0);

}  // namespace muddformer
