// Deferred gradients of the hidden states: what several layers of aggregation would each add to the
// gradient of every older hidden state X_j is added in one pass,
//
//   dX_j = G_j + sum_i sum_c weights_i[..., c, j] * dV_{i,c}
//
// over the layers i of a group and their ways c. dV_{i,c} is the gradient of way c's sum over the
// sources. The older hidden states are those which all layers of the group mix first, in the same
// order; nothing may need dX_j before the backward leaves the group: what defer_gradients() and the
// layers hand on has only a part of its gradient, what it was given has all of it. A layer then
// reads X_j (for the gradient of its weights) but does not read and write dX_j.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>
#include <vector>

#include "../../macros.h"

namespace muddformer {

/// What a layer of a group is given, see defer_gradients(): unchanged, and to one call. One without
/// tickets defers nothing. Tickets of hidden states that require no gradients carry none, and are
/// refused with hidden states that require some.
struct Deferral {
  /// Placeholders of no size in memory, whose gradients carry dV_c [..., D] of the C ways and the
  /// weights [..., C, S].
  std::vector<at::Tensor> tickets;
  /// Number of the layer's first hidden states whose gradients are deferred.
  int64_t count = 0;
};

/// Opens a group: the layers to come leave the gradients of these hidden states to its backward.
///
/// @param hiddens the older hidden states [..., D] that all layers of the group mix first; the
///   layers are given the ones that are returned.
/// @param ways number of ways C of each layer of the group.
/// @param sources number of sources S of each layer of the group.
/// @return (hidden states to be used from here on, a deferral for each layer).
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API std::tuple<std::vector<at::Tensor>, std::vector<Deferral>> defer_gradients(
    at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources);

}  // namespace muddformer
