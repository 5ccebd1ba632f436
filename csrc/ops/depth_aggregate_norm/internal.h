// What the operator's backends know of the aggregation with normed streams.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../common/dispatch.h"
#include "../common/norms.h"
#include "../common/rows.h"

namespace muddformer::detail {

/// (streams, the newest source as it was mixed [..., D] with a pre weight and [0] without, the last
/// way's sum before its norm [..., D] with a post weight and [0] without, statistics [2, C, N] of
/// the N tokens: mean and 1 / sqrt(...) of every way, 0 and 1 where it has no norm, float32 or
/// float64; with a pre weight [2, C + 1, N], the newest source last).
using NormedStreams = std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>;

/// depth_aggregate_norm_chained() without gradients, and what its backward reads.
NormedStreams depth_aggregate_norm_forward(at::TensorList hiddens, const at::Tensor& weights,
                                           const StreamNorms& norms);

/// What the forward returned; [0] does for the output of a way without a norm weight.
struct NormsForward {
  at::TensorList outputs;
  const at::Tensor& mix;
  const at::Tensor& statistics;
};

template <>
struct Spelling<const NormsForward&> {
  using Arguments = Types<at::TensorList, const at::Tensor&, const at::Tensor&>;
  static NormsForward join(at::TensorList outputs, const at::Tensor& mix,
                           const at::Tensor& statistics) {
    return {outputs, mix, statistics};
  }
  static std::tuple<at::TensorList, const at::Tensor&, const at::Tensor&> split(
      const NormsForward& forward) {
    return {forward.outputs, forward.mix, forward.statistics};
  }
};

/// Of (the hidden states that are not deferred, weights, norm weights, norm biases, pre weight,
/// post weight); [0] for each that was not given. Last, with deferred hidden states, the gradients
/// of what the ways with a norm norm (dV, deferred_flush.h), [0] for other ways and without.
using NormsGradients =
    std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>,
               std::vector<at::Tensor>, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

/// Gradients of depth_aggregate_norm_chained(), in one pass over the history.
///
/// @param grad_outputs C gradients of the streams; none stands for zero.
/// @param grad_hiddens S gradients of the handed-on sources (with a pre weight of the newest as it
///   was mixed); none stands for zero.
/// @param hiddens the sources as they came.
/// @param deferred number of the first hidden states that get no gradient here, with add_newest or
///   pre_weight fewer than S.
NormsGradients depth_aggregate_norm_backward(const OptionalTensors& grad_outputs,
                                             const OptionalTensors& grad_hiddens,
                                             at::TensorList hiddens, const at::Tensor& weights,
                                             const StreamNorms& norms, const NormsForward& forward,
                                             int64_t deferred);

// Whether way c has a norm: one of its own, or, the last one, the post norm.
bool has_norm(const StreamNorms& norms, int64_t c);

void check_depth_aggregate_norm(at::TensorList hiddens, const at::Tensor& weights,
                                const StreamNorms& norms);
// With add_newest or pre_weight the newest hidden state must not be deferred.
void check_newest_kept(at::TensorList hiddens, const StreamNorms& norms, int64_t deferred);
// What check_depth_aggregate_norm() checks, and what is the backward's own.
void check_depth_aggregate_norm_backward(const OptionalTensors& grad_outputs,
                                         const OptionalTensors& grad_hiddens,
                                         at::TensorList hiddens, const at::Tensor& weights,
                                         const StreamNorms& norms, const NormsForward& forward,
                                         int64_t deferred);

// Gradients that nothing has been written to. empty(tensor, given) makes one of the shape of the
// tensor, or of shape [0] for what was not given.
template <typename Empty>
NormsGradients empty_gradients(at::TensorList hiddens, const at::Tensor& weights,
                               const StreamNorms& norms, int64_t deferred, Empty empty) {
  const at::Tensor& like = hiddens[0];
  const auto of = [&](const std::optional<at::Tensor>& tensor) {
    return empty(tensor.has_value() ? *tensor : like, tensor.has_value());
  };
  std::vector<at::Tensor> grad_hiddens, grad_norm_weights, grad_norm_biases, grad_sums;
  const auto ways = static_cast<int64_t>(norms.weights.size());
  for (int64_t c = 0; c < ways; ++c) {
    grad_norm_weights.push_back(of(entry(norms.weights, c)));
    grad_norm_biases.push_back(of(entry(norms.biases, c)));
    grad_sums.push_back(empty(like, deferred > 0 && has_norm(norms, c)));
  }
  const auto count = static_cast<int64_t>(hiddens.size()) - deferred;
  grad_hiddens.reserve(count);
  for (int64_t j = 0; j < count; ++j) grad_hiddens.push_back(empty(like, true));
  return {std::move(grad_hiddens),     empty(weights, true), std::move(grad_norm_weights),
          std::move(grad_norm_biases), of(norms.pre_weight), of(norms.post_weight),
          std::move(grad_sums)};
}

// Whether the kernels of this build make the norms on x's device; in cuda.cpp.
bool norms_fused_by_cuda(const at::Tensor& x, int64_t sources, int64_t ways);

}  // namespace muddformer::detail
