// A stack of blocks with Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170).
#pragma once

#include <c10/util/FunctionRef.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "depth_aggregation.h"

namespace muddformer {

/// Which connections a stack of blocks has; see MUDDFormerConfig and DepthAggregationOptions.
struct MUDDStackOptions {
  /// Model width D.
  int64_t dim = 0;
  /// The blocks are called with four streams (xq, xk, xv, xr), each with its own aggregate. false:
  /// they are called with one stream x.
  bool multiway = false;
  /// false: no connections at all.
  bool dense = true;
  /// With multiway: the ways that are aggregated, a part of "qkvr"; one left out takes the newest
  /// hidden state. Without "r" nothing is aggregated after the last block.
  std::string ways = "qkvr";
  bool dynamic = true;
  /// Which hidden states are mixed where, see aggregation_plan().
  int64_t source_stride = 1;
  int64_t block_stride = 1;
  std::optional<int64_t> window = std::nullopt;
  bool pre_norm = false;
  std::string post_norm = "none";
  /// The last generator has a hidden layer four times as wide.
  bool expand_last = true;
  bool round64 = true;
  double eps = 1e-6;
  std::string gelu_approximate = "none";
  std::optional<double> cap = std::nullopt;
  /// Aggregations that add to the gradients of older hidden states together, see flush_groups().
  /// Left out: on CUDA in bfloat16 and float16 the groups that move the fewest bytes; 1: none.
  std::optional<int64_t> flush_interval = std::nullopt;
};

/// The priors [C, S] of all aggregations, as parameters "0", "1", ...
class MUDDFORMER_API PriorsImpl : public torch::nn::Cloneable<PriorsImpl> {
 public:
  /// @param shapes [C, S] of each; the priors have no values yet, see Connections.
  explicit PriorsImpl(std::vector<std::vector<int64_t>> shapes = {},
                      at::TensorOptions options = {});
  void reset() override;
  /// The prior of aggregation n, n < size().
  const at::Tensor& operator[](size_t n) const { return parameters_[n].value(); }
  size_t size() const { return parameters_.size(); }
  void pretty_print(std::ostream& stream) const override;

 private:
  std::vector<std::vector<int64_t>> shapes_;
  at::TensorOptions options_;
};
TORCH_MODULE(Priors);

/// The connections of a stack of blocks: what a module that runs blocks is given to hold them.
///
/// Not a module, because its parts belong to the module that owns it and have the names of the
/// public release there: `dense_bs.n` (priors), `dynamic_dense.n.{w1,w2}.weight`, n counting the
/// aggregations; PreDANorm adds `source_norms.j.weight` for hidden states that join without one.
class MUDDFORMER_API Connections {
 public:
  /// @throws c10::ValueError naming the option, what was expected and what came.
  Connections(MUDDStackOptions options, int64_t layers, at::TensorOptions tensor_options);

  /// Makes the parts anew, without values, and registers them as submodules of `owner`.
  void reset(torch::nn::Module& owner);
  /// Gives the parts their initial values, with which the stack computes what its blocks alone
  /// compute.
  void reset_parameters();
  std::vector<at::Tensor> parameters() const;

  /// Runs the blocks.
  ///
  /// @param x X_0 [..., D], the embedding output.
  /// @param block block(i, streams, normed) calls block i from 0 with its one or four streams.
  /// @param stream_norms stream_norms(i) are the norms with which block i reads four streams, an
  ///   empty holder for one without. The aggregation makes them, and normed is true then. An empty
  ///   list: the block does so itself.
  /// @return the residual way's aggregate after the last block [..., D].
  /// @throws c10::ValueError if x has another width than dim, or a block returns another shape than
  ///   that of its input; c10::Error if a block changes its input in place, which the history still
  ///   holds.
  at::Tensor run(const at::Tensor& x,
                 c10::function_ref<at::Tensor(int64_t, at::TensorList, bool)> block,
                 c10::function_ref<std::vector<Norm>(int64_t)> stream_norms) const;

  MUDDStackOptions options;
  /// Which hidden states each aggregation mixes, see aggregation_plan().
  std::map<int64_t, std::vector<int64_t>> plan;
  Priors dense_bs{nullptr};
  /// Of DepthAggregation.
  torch::nn::ModuleList dynamic_dense{nullptr};
  Norms source_norms{nullptr};

 private:
  int64_t layers_ = 0;
  at::TensorOptions tensor_options_;
  // Whether X_j joins the history by itself, not as the newest of an aggregation.
  std::vector<bool> joins_;
  // By the first aggregation of a group: all of them, and their numbers of ways and of sources.
  struct FlushGroup {
    std::vector<int64_t> layers, ways, sources;
  };
  std::map<int64_t, FlushGroup> flush_groups_;

  // Whether a group of aggregations defers the gradients of these hidden states.
  bool defers(at::TensorList older) const;
};

/// Runs a list of blocks with MUDD connections, in place of a loop over them.
///
/// After a block an aggregation mixes all hidden states so far into the streams of the next block;
/// after the last block only the residual way is made, which is the result. A fresh stack computes
/// what the blocks alone compute (but for a pre-norm without post-norm, and a cap of at most 1).
///
///     torch::nn::Sequential blocks(MyBlock(64), MyBlock(64), MyBlock(64));
///     muddformer::MUDDStack stack(blocks, muddformer::MUDDStackOptions{.dim = 64});
///     at::Tensor y = stack->forward(x);
///
/// forward() is a template, so a stack is called by name and not put into a Sequential. Python's
/// gradient_checkpointing has no counterpart.
class MUDDFORMER_API MUDDStackImpl : public torch::nn::Cloneable<MUDDStackImpl> {
 public:
  /// @param blocks each one's forward takes one stream x, or with multiway four (xq, xk, xv, xr),
  ///   and what else MUDDStackImpl::forward() is given; it returns one tensor of the shape of x.
  ///   The stack holds these very modules, as submodules `layers.i`.
  /// @throws c10::ValueError naming the option, what was expected and what came.
  MUDDStackImpl(torch::nn::Sequential blocks, MUDDStackOptions options,
                at::TensorOptions tensor_options = {}, bool initialize = true);
  void reset() override;
  /// Gives the connections their initial values; those of the blocks stay.
  void reset_parameters() { connections.reset_parameters(); }

  /// Runs the blocks.
  ///
  /// @param x X_0 [..., D].
  /// @param arguments passed on to every block, after its streams.
  /// @return the residual way's aggregate after the last block [..., D] (before any final norm).
  /// @throws c10::Error if a block changes its input in place, or its forward takes other
  /// arguments.
  template <class... Arguments>
  at::Tensor forward(const at::Tensor& x, const Arguments&... arguments) {
    auto block = layers->begin();
    return connections.run(
        x,
        [&](int64_t, at::TensorList streams, bool) {
          torch::nn::AnyModule& layer = *block++;
          return streams.size() == 1
                     ? layer.template forward<at::Tensor>(streams[0], arguments...)
                     : layer.template forward<at::Tensor>(streams[0], streams[1], streams[2],
                                                          streams[3], arguments...);
        },
        [](int64_t) { return std::vector<Norm>(); });
  }

  /// The parameters of the connections, which usually have no weight decay.
  std::vector<at::Tensor> connection_parameters() const { return connections.parameters(); }

  torch::nn::Sequential layers{nullptr};
  Connections connections;
};
TORCH_MODULE(MUDDStack);

}  // namespace muddformer
