// The connections of a stack of blocks, without the blocks (arXiv 2502.12170).
#pragma once

#include <torch/nn/modules/container/modulelist.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
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

/// Makes a layer of connections, whose values are not used: in place of DepthAggregation itself,
/// for a stack of layers of a class that derives from it.
using MakeAggregation = std::function<std::shared_ptr<DepthAggregationImpl>(
    const DepthAggregationOptions&, const at::TensorOptions&)>;

class History;

/// The connections of a stack of blocks: what a module that runs blocks is given to hold them.
///
/// Not a module, because its parts belong to the module that owns it and have the names of the
/// public release there: `dense_bs.n` (priors), `dynamic_dense.n.{w1,w2}.weight`, n counting the
/// aggregations; PreDANorm adds `source_norms.j.weight` for hidden states that join without one.
class MUDDFORMER_API Connections {
 public:
  /// @param dim model width D.
  /// @param layers number of blocks L, at most 65535.
  /// @param eps added to the mean square in the norms.
  /// @param tensor_options dtype and device of the parameters.
  /// @param make_aggregation makes the layers; by default they are DepthAggregation.
  /// @throws c10::ValueError, c10::TypeError naming the option, what was expected and what came.
  Connections(int64_t dim, int64_t layers, const ConnectionOptions& options, double eps = 1e-6,
              at::TensorOptions tensor_options = {}, MakeAggregation make_aggregation = {});

  /// Makes the parts anew, without values, and registers them as submodules of `owner`.
  void reset(torch::nn::Module& owner);
  /// Gives the parts their initial values, with which the stack computes what its blocks alone
  /// compute.
  ///
  /// @throws c10::Error before reset(), as parameters() does.
  void reset_parameters();
  std::vector<at::Tensor> parameters() const;

  /// The history of a forward pass, for a stack with these connections. It must not outlive them.
  ///
  /// @param x0 X_0 [..., D], the embedding output.
  /// @throws c10::TypeError, c10::ValueError if x0 is undefined, or of another width than dim where
  ///   anything is aggregated; c10::Error before reset().
  History begin(const at::Tensor& x0) const;

  ConnectionOptions options;
  /// Which hidden states each aggregation mixes, see aggregation_plan().
  std::map<int64_t, std::vector<int64_t>> plan;
  Priors dense_bs{nullptr};
  /// Of DepthAggregation.
  torch::nn::ModuleList dynamic_dense{nullptr};
  Norms source_norms{nullptr};

 private:
  friend class History;

  // By the first aggregation of a group: all of them, and their numbers of ways and of sources.
  struct FlushGroup {
    std::vector<int64_t> layers, ways, sources;
  };
  void check_reset(const char* call) const;
  // Whether a group of aggregations defers the gradients of these hidden states.
  bool defers(at::TensorList older) const;

  int64_t dim_, layers_;
  double eps_;
  at::TensorOptions tensor_options_;
  MakeAggregation make_aggregation_;
  // Whether X_j joins the history by itself, not as the newest of an aggregation.
  std::vector<bool> joins_;
  std::map<int64_t, FlushGroup> flush_groups_;
};

/// What a forward pass through a stack carries from block to block: the hidden states that later
/// aggregations mix, and whose turn it is.
///
///     History history = connections.begin(x0);
///     for (auto& block : blocks) history.append(block->forward(history.streams()));
///     at::Tensor y = history.result();
///
/// Every call out of this order, and a second one, is a c10::Error that says what was to come.
class MUDDFORMER_API History {
 public:
  History(const History&) = delete;  // a hidden state is handed on once
  History& operator=(const History&) = delete;
  History(History&&) = default;
  History& operator=(History&&) = default;
  ~History() = default;

  /// What the next block reads, once for each block.
  ///
  /// @param norms the norms with which it reads xq, xk, xv and xr, an empty holder for a stream
  ///   that has none; the streams have passed them then. On CUDA the aggregation makes them in the
  ///   same pass. By default none: the block norms what it reads itself.
  /// @return (xq, xk, xv, xr), [..., D] each, or without multiway and norms one stream for all.
  /// @throws c10::ValueError for another number of norms.
  std::vector<at::Tensor> streams(const std::vector<Norm>& norms = {});

  /// Takes the output of the block whose streams() were made [..., D].
  ///
  /// @throws c10::TypeError, c10::ValueError if it is undefined or of another shape than the
  ///   streams; c10::Error if the block changed a stream or X_i in place, because the history still
  ///   holds them (not seen of tensors of inference mode: there the result is wrong).
  void append(at::Tensor x);

  /// The residual way's aggregate after the last block [..., D]; the history ends with it.
  at::Tensor result();

 private:
  friend class Connections;
  History(const Connections& connections, const at::Tensor& x0);

  void check_open(const char* call) const;
  void join(at::Tensor x);
  std::vector<at::Tensor> aggregate(const std::vector<Norm>& norms);

  const Connections* connections_;
  int64_t count_ = 0;  // of the blocks whose output is here
  bool ended_ = false;
  at::Tensor newest_;                // X_count, until something has been made of it
  std::vector<at::Tensor> hiddens_;  // X_j by j, those that an aggregation to come mixes
  std::map<int64_t, Deferral> deferrals_;
  // What the block has been given: the streams and, last, X_count; empty in between. And how often
  // each had been changed.
  std::vector<at::Tensor> given_;
  std::vector<int64_t> versions_;
};

}  // namespace muddformer
