// Aggregation of hidden states over depth (arXiv 2502.12170, section 2; the sum of Eq. 5 and 7):
//
//   Y_c[..., :] = sum_j weights[..., c, j] * X_j[..., :],   c = 0..C-1, j = 0..S-1
//
// Hidden states X_j are [..., D], weights are [..., C, S]. float64, float32, bfloat16 or float16,
// one dtype for all; sums are accumulated in float32 (float64 for float64) and rounded once. The
// functions go through the dispatcher: autograd, autocast, torch.compile and every backend apply.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../../macros.h"
#include "../deferred_flush/deferred_flush.h"

namespace muddformer {

/// Weighted sums of hidden states over depth.
///
/// @param hiddens the S >= 1 sources, each [..., D], of one shape, dtype and device. The same
///   tensor may stand twice; none needs to be contiguous.
/// @param weights connection weights [..., C, S], C >= 1.
/// @return the C streams, each [..., D], new tensors.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API std::vector<at::Tensor> depth_aggregate(at::TensorList hiddens,
                                                       const at::Tensor& weights);

/// depth_aggregate() that also hands its sources on.
///
/// Whatever comes later uses the returned hidden states in place of the given ones. Then the
/// backward receives the gradient that later layers have accumulated and returns it plus its own
/// term from one pass over the history, and autograd adds nothing.
///
/// @param deferral what defer_gradients() returned for this layer; by default every gradient is
///   made here.
/// @return (streams, hiddens).
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_chained(
    at::TensorList hiddens, const at::Tensor& weights, const Deferral& deferral = {});

}  // namespace muddformer
