// What the operator's backends and the operators built on it know of deferred gradients.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../common/norms.h"

namespace muddformer::detail {

/// The sum of deferred_flush.h.
///
/// @param grad_hiddens G_j of the older hidden states [..., D]; none stands for zero.
/// @param grad_sums dV of all ways of all layers, layer by layer, [..., D]; none stands for zero,
///   but not all.
/// @param weights connection weights [..., C_i, S_i] of every layer; column j belongs to X_j.
/// @return dX_j, new tensors.
std::vector<at::Tensor> deferred_flush(const OptionalTensors& grad_hiddens,
                                       const OptionalTensors& grad_sums, at::TensorList weights);

void check_defer_gradients(at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources);
// Marks a layer's tickets as used, after checking that they are one layer's own, not used before,
// that as many hidden states are deferred as the group has, and that the tickets carry gradients
// where these hidden states have some. A layer that is computed again in a backward, for a
// checkpoint, is not looked at.
void use_tickets(at::TensorList hiddens, at::TensorList tickets, int64_t deferred);
// Returns a tensor of the shape, dtype and device of the gradients.
at::Tensor check_deferred_flush(const OptionalTensors& grad_hiddens,
                                const OptionalTensors& grad_sums, at::TensorList weights);

}  // namespace muddformer::detail
