// One layer of Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170).
//
// B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C:
// number of ways.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "../ops/deferred_flush/deferred_flush.h"
#include "matrices.h"
#include "norm.h"
#include "options.h"

namespace muddformer {

struct DepthAggregationOptions {
  /// Model width D.
  int64_t dim = 0;
  /// Number of hidden states S that are mixed, the newest last.
  int64_t sources = 0;
  /// A part of "qkvr": four streams are returned, one left out being the newest hidden state. Or a
  /// number C: C streams are returned, the last one counting as the residual way.
  std::variant<std::string, int64_t> ways = "qkvr";
  /// Factor of the generator's hidden width K = C * S * expand.
  int64_t expand = 1;
  /// false: the module has no prior of its own; every call gets one.
  bool prior = true;
  /// Added to the mean square in the norms.
  double eps = 1e-6;
  /// How they are mixed: dynamic, pre_norm, post_norm, round64, cap and gelu_approximate (with
  /// pre_norm the older hidden states are expected as an earlier layer returned them).
  ConnectionOptions connections = {.round64 = false};

  bool operator==(const DepthAggregationOptions&) const = default;
};

/// Depth-wise aggregation DA_i: mixes the hidden states of all layers so far, with weights made
/// from the newest.
///
/// `A = GELU(RMSNorm(X_i) W1^T) W2^T + prior` and `Y_c = sum_j A[..., c, j] X_j` (Eq. 5 to 8). A
/// fresh layer passes X_i on: every Y_c is X_i (but for a pre-norm without a post-norm, where it is
/// the normed X_i, and a cap of at most 1).
class MUDDFORMER_API DepthAggregationImpl : public torch::nn::Cloneable<DepthAggregationImpl> {
 public:
  /// @throws c10::ValueError, c10::TypeError naming the option, what was expected and what came.
  explicit DepthAggregationImpl(DepthAggregationOptions options,
                                at::TensorOptions tensor_options = {}, bool initialize = true);
  void reset() override;
  /// Passes X_i on: W1 ~ Normal(variance 1/D), W2 = 0, prior 1 on X_i (0 with post_norm; with
  /// a cap what it bounds to 1).
  virtual void reset_parameters();
  /// Fills a prior [C, S] for this layer with its initial values, in place.
  ///
  /// @throws c10::TypeError, c10::ValueError if it is undefined or of another shape.
  virtual void reset_prior(at::Tensor prior) const;

  /// Mixes hidden states.
  ///
  /// @param hiddens the S sources, each [..., D], of one shape, dtype and device, X_i last.
  /// @param prior [C, S], in place of the module's own.
  /// @param stream_norms norms of the streams that are returned, an empty holder for a stream that
  ///   stays as it is; or none at all. On CUDA they cost no pass of their own
  ///   (depth_aggregate_norm_chained()).
  /// @param deferral what defer_gradients() returned for this layer, if anything.
  /// @return (streams, hiddens): the streams, each [..., D], and the sources that later layers get
  ///   in place of those that came (their gradients are chained, and with pre_norm the newest is
  ///   now the normed one).
  /// @throws c10::ValueError, c10::TypeError naming the argument: a wrong number of sources or norms,
  ///   another width than dim, a missing prior or one of another shape.
  std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> forward(
      at::TensorList hiddens, const at::Tensor& prior = {},
      const std::vector<Norm>& stream_norms = {}, const Deferral& deferral = {});

  /// Connection weights of every token, of the newest hidden state. A class that derives from this
  /// one overrides it to weigh hidden states otherwise, with a softmax over depth say; everything
  /// else stays as it is.
  ///
  /// @param x X_i [..., D].
  /// @param prior [C, S].
  /// @return (weights [..., C, S] of the dtype of x, x to be used from here on, so that its gradient
  ///   is chained).
  virtual std::tuple<at::Tensor, at::Tensor> connection_weights(const at::Tensor& x,
                                                                const at::Tensor& prior);

  /// @throws c10::Error for a class that derives from this one, which has to override it.
  std::shared_ptr<torch::nn::Module> clone(
      const std::optional<at::Device>& device = std::nullopt) const override;
  /// Number of ways C.
  int64_t num_ways() const;
  void pretty_print(std::ostream& stream) const override;

  DepthAggregationOptions options;
  /// The generator; empty for static connections.
  Linear w1{nullptr}, w2{nullptr};
  /// With pre_norm: the generator's norm (submodule `norm`), and the norm of the newest hidden
  /// state.
  Norm generator_norm{nullptr}, pre_norm{nullptr};
  /// The norms of the sums by number of the way; empty without post_norm.
  Norms post_norms{nullptr};
  /// [C, S], or undefined.
  at::Tensor prior;

 private:
  // What the ways make, the hidden states to be used from here on, and X_i likewise. A norm a way.
  struct Mixed {
    std::vector<at::Tensor> streams, hiddens;
    at::Tensor newest;
  };
  Mixed mix(at::TensorList hiddens, const at::Tensor& prior, const std::vector<Norm>& norms,
            const Deferral& deferral);
  // The same on CUDA where the aggregation itself can make the norms, or the whole layer be one
  // launch; nothing where it cannot.
  std::optional<Mixed> mix_fused(at::TensorList hiddens, const at::Tensor& prior,
                                 const std::vector<Norm>& norms, const Deferral& deferral);
  // Whether connection_weights() may be another class's.
  bool derived() const;
  void check_prior(const at::Tensor& tensor) const;

  at::TensorOptions tensor_options_;
};
TORCH_MODULE(DepthAggregation);

}  // namespace muddformer
