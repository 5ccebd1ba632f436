// Aggregation of hidden states over depth (arXiv 2502.12170, section 2; the sum of Eq. 5 and 7):
//
//   Y_c[..., :] = sum_j weights[..., c, j] * X_j[..., :],   c = 0..C-1, j = 0..S-1
//
// Hidden states X_j are [..., D], weights are [..., C, S]. float64, float32, bfloat16 or float16,
// one dtype for all; sums are accumulated in float32 (float64 for float64) and rounded once. The
// functions go through the dispatcher: autograd, autocast, torch.compile and every backend apply.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../macros.h"
#include "../deferred_flush/deferred_flush.h"

namespace muddformer {

/// Weighted sums of hidden states over depth.
///
/// @param hiddens the S >= 1 sources, each [..., D], of one shape, dtype and device. The same
/// tensor may
///   stand twice; none needs to be contiguous.
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

/// Gradients of depth_aggregate_chained(), in one pass over the history:
///
///   dX_j = grad_hiddens_j + sum_c weights[..., c, j] * dY_c,   dW[..., c, j] = <dY_c, X_j>
///
/// @param grad_outputs C gradients dY_c, [..., D]; none stands for zero.
/// @param grad_hiddens S gradients of the handed-on sources; none stands for zero. May be empty:
/// all none.
/// @param hiddens, weights as in the forward.
/// @param deferred number of the first hidden states that get no gradient here.
/// @return (gradients of the other hidden states, gradient of the weights), new tensors.
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward(
    const c10::List<std::optional<at::Tensor>>& grad_outputs,
    const c10::List<std::optional<at::Tensor>>& grad_hiddens, at::TensorList hiddens,
    const at::Tensor& weights, int64_t deferred = 0);

}  // namespace muddformer
