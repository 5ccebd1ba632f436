// What the operator's backends and the operators built on it know of the aggregation.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../common/norms.h"

namespace muddformer::detail {

/// Gradients of depth_aggregate_chained(), in one pass over the history:
///
///   dX_j = grad_hiddens_j + sum_c weights[..., c, j] * dY_c,   dW[..., c, j] = <dY_c, X_j>
///
/// @param grad_outputs C gradients dY_c, [..., D]; none stands for zero.
/// @param grad_hiddens S gradients of the handed-on sources; none stands for zero. May be empty:
///   all none.
/// @param hiddens as in the forward.
/// @param weights as in the forward.
/// @param deferred number of the first hidden states that get no gradient here.
/// @return (gradients of the other hidden states, gradient of the weights), new tensors.
std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, int64_t deferred);

void check_hiddens(at::TensorList hiddens);
void check_depth_aggregate(at::TensorList hiddens, const at::Tensor& weights);
void check_depth_aggregate_backward(const OptionalTensors& grad_outputs,
                                    const OptionalTensors& grad_hiddens, at::TensorList hiddens,
                                    const at::Tensor& weights, int64_t deferred);
void check_deferral(at::TensorList hiddens, const at::Tensor& weights, at::TensorList tickets,
                    int64_t deferred);

}  // namespace muddformer::detail
