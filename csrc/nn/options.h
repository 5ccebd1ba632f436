// What connections a stack of blocks has: one object that stacks, layers and models take whole.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "../macros.h"

namespace muddformer {

/// Which hidden states are mixed into which streams, and how; the same fields with the same
/// defaults as muddformer.nn.ConnectionOptions in Python.
///
/// Every user of it takes checked().
struct ConnectionOptions {
  /// false: no connections at all; of the fields below multiway (of a stack), gelu_approximate (of
  /// a model) and residual_dtype still count.
  bool dense = true;
  /// Connection weights depend on the token; false: the static prior alone.
  bool dynamic = true;
  /// Blocks have four streams (xq, xk, xv, xr), each with its own aggregate. false: one stream x.
  bool multiway = false;
  /// With multiway: the ways that are aggregated, a part of "qkvr"; one left out takes the newest
  /// hidden state. Without "r" nothing is aggregated after the last block.
  std::string ways = "qkvr";
  /// k of "k x p": every k-th hidden state is a source (with the first and the newest).
  int64_t source_stride = 1;
  /// p of "k x p": an aggregation after every p-th block and after the last.
  int64_t block_stride = 1;
  /// Only the newest `window` hidden states and the first are sources. Left out: all.
  std::optional<int64_t> window = std::nullopt;
  /// PreDANorm: hidden states pass an RMSNorm once, when they join the history (and the generator's
  /// norm has a weight).
  bool pre_norm = false;
  /// PostDANorm: `Y_c = X_i + sum_j ...` with an RMSNorm of the sum of the residual way
  /// ("residual") or of every way ("all"). "none": no norm and no addition.
  std::string post_norm = "none";
  /// The last generator has a hidden layer four times as wide.
  bool expand_last = true;
  /// Hidden widths of the generators go up to the next multiple of 64 (an exact multiple too).
  bool round64 = true;
  /// Soft bound of the connection weights, cap * tanh(A / cap). Left out: no bound.
  std::optional<double> cap = std::nullopt;
  /// "none" (erf form) or "tanh", in the generators and in a model's feed-forward networks.
  std::string gelu_approximate = "none";
  /// Aggregations that add to the gradients of older hidden states together, see flush_groups().
  /// Left out: on CUDA in bfloat16 and float16 the groups that move the fewest bytes; 1: none.
  std::optional<int64_t> flush_interval = std::nullopt;
  /// dtype of the hidden states, and so of the residual stream, under autocast: "autocast", the one
  /// that autocast has, or "float32", that of the connections' parameters, with which the history
  /// takes twice the memory and its time. Left out: autocast's with connections, what the blocks
  /// get and return without. Outside autocast it has no effect.
  std::optional<std::string> residual_dtype = std::nullopt;

  bool operator==(const ConnectionOptions&) const = default;

  /// A copy whose every field has been checked, with `ways` in the order of "qkvr".
  ///
  /// @throws c10::ValueError naming the option, what was expected and what came.
  MUDDFORMER_API ConnectionOptions checked() const;
};

}  // namespace muddformer
