// A stack of blocks with Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170).
#pragma once

#include <torch/nn/modules/container/sequential.h>

#include <vector>

#include "connections.h"

namespace muddformer {

/// Runs a list of blocks with MUDD connections, in place of a loop over them.
///
/// After a block an aggregation mixes all hidden states so far into the streams of the next block;
/// after the last block only the residual way is made, which is the result. A fresh stack computes
/// what the blocks alone compute (but for a pre-norm without post-norm, and a cap of at most 1).
///
///     torch::nn::Sequential blocks(MyBlock(64), MyBlock(64), MyBlock(64));
///     muddformer::MUDDStack stack(blocks, 64);
///     at::Tensor y = stack->forward(x);
///
/// forward() is a template, so a stack is called by name and not put into a Sequential. Python's
/// gradient_checkpointing has no counterpart.
class MUDDFORMER_API MUDDStackImpl : public torch::nn::Cloneable<MUDDStackImpl> {
 public:
  /// @param blocks each one's forward takes one stream x, or with multiway four (xq, xk, xv, xr),
  ///   and what else MUDDStackImpl::forward() is given; it returns one tensor of the shape of x.
  ///   The stack holds these very modules, as submodules `layers.i`.
  /// @param dim model width D.
  /// @param eps added to the mean square in the norms.
  /// @param tensor_options dtype and device of the connections' parameters.
  /// @param make_aggregation makes the layers of connections; by default they are DepthAggregation.
  /// @throws c10::ValueError, c10::TypeError naming the option, what was expected and what came.
  MUDDStackImpl(torch::nn::Sequential blocks, int64_t dim, const ConnectionOptions& options = {},
                double eps = 1e-6, at::TensorOptions tensor_options = {}, bool initialize = true,
                MakeAggregation make_aggregation = {});
  void reset() override;
  /// Gives the connections their initial values; those of the blocks stay.
  void reset_parameters() { connections.reset_parameters(); }

  /// Runs the blocks.
  ///
  /// @param x X_0 [..., D].
  /// @param arguments passed on to every block, after its streams.
  /// @return the residual way's aggregate after the last block [..., D] (before any final norm).
  /// @throws c10::Error if a block changes its input in place, or its forward takes other
  ///   arguments.
  template <class... Arguments>
  at::Tensor forward(const at::Tensor& x, const Arguments&... arguments) {
    History history = connections.begin(x);
    for (torch::nn::AnyModule& layer : *layers) {
      const std::vector<at::Tensor> s = history.streams();
      history.append(s.size() == 1
                         ? layer.forward<at::Tensor>(s[0], arguments...)
                         : layer.forward<at::Tensor>(s[0], s[1], s[2], s[3], arguments...));
    }
    return history.result();
  }

  /// The parameters of the connections, which usually have no weight decay.
  std::vector<at::Tensor> connection_parameters() const { return connections.parameters(); }

  torch::nn::Sequential layers{nullptr};
  Connections connections;
};
TORCH_MODULE(MUDDStack);

}  // namespace muddformer
