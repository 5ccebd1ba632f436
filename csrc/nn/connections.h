// The connections of a stack of blocks, without the blocks (arXiv 2502.12170).
#pragma once

#include <c10/util/FunctionRef.h>
#include <torch/nn/modules/container/modulelist.h>

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "depth_aggregation.h"
#include "plan.h"

namespace muddformer {

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
  /// @param dim model width D.
  /// @param layers number of blocks L.
  /// @param eps added to the mean square in the norms.
  /// @param tensor_options dtype and device of the parameters.
  /// @throws c10::ValueError naming the option, what was expected and what came.
  Connections(const ConnectionOptions& options, int64_t dim, int64_t layers, double eps,
              at::TensorOptions tensor_options);

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

  ConnectionOptions options;
  /// Which hidden states each aggregation mixes, see aggregation_plan().
  std::map<int64_t, std::vector<int64_t>> plan;
  Priors dense_bs{nullptr};
  /// Of DepthAggregation.
  torch::nn::ModuleList dynamic_dense{nullptr};
  Norms source_norms{nullptr};

 private:
  int64_t dim_, layers_;
  double eps_;
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

}  // namespace muddformer
