// The language model of all families, with MUDD connections or without.
#pragma once

#include <torch/nn/modules/common.h>
#include <torch/nn/modules/container/modulelist.h>

#include <vector>

#include "../nn/connections.h"
#include "config.h"
#include "kv_cache.h"
#include "layers.h"

namespace muddformer {

class MUDDFormer;

/// MUDDFormer, MUDDPythia or another family (config.model_type), or its plain twin (config.dense =
/// false).
///
/// `X_0 = Embedding(ids)`, the blocks with MUDD connections, final norm, linear head. Parameters
/// have the names of the public release and of the Python model: what named_parameters() lists is
/// what a checkpoint holds.
class MUDDFORMER_API MUDDFormerImpl : public torch::nn::Cloneable<MUDDFormerImpl> {
 public:
  /// @param config what the model computes; the model keeps config.checked().
  /// @param options dtype (float64, float32, bfloat16 or float16) and device of the parameters.
  /// @param initialize false: the parameters are allocated without values, for a loader that fills
  ///   them all.
  /// @throws c10::ValueError, c10::TypeError naming the field or argument, what was expected and
  ///   what came.
  explicit MUDDFormerImpl(const MUDDFormerConfig& config, at::TensorOptions options = {},
                          bool initialize = true);

  /// Makes the modules anew, with parameters that hold no values yet.
  void reset() override;

  /// Gives all parameters their initial values.
  ///
  /// Matrices and embeddings ~ Normal(0, initializer_range), biases 0, norms 1; connections as
  /// DepthAggregationImpl::reset_parameters() has it, so that a fresh model computes what its plain
  /// twin computes (but for a pre-norm without post-norm, and a cap of at most 1). The connections
  /// come last: a model and its plain twin draw equal values from equal seeds.
  void reset_parameters();

  /// Scores of the next token at every position, or their loss.
  ///
  /// @param input_ids token ids [B, T], int64 or int32, T at most config.block_size.
  /// @param targets the tokens to predict [B, T], int64 or int32; positions with -100 do not count.
  ///   Undefined: the scores are returned.
  /// @param cache keys and values of the tokens that input_ids follows, which are added to it.
  /// @return logits [B, T, vocab_size]; with targets the mean cross-entropy instead, a float32
  ///   scalar (float64 for a float64 model).
  /// @throws c10::TypeError, c10::ValueError for a wrong dtype, shape, length or cache;
  ///   c10::IndexError for a token id outside the vocabulary (on CUDA: torch's device-side
  ///   assertion); c10::Error with a cache while gradients are enabled.
  at::Tensor forward(const at::Tensor& input_ids, const at::Tensor& targets = {},
                     KVCache* cache = nullptr);

  /// The plain Transformer with copies of this model's weights, without its connections.
  ///
  /// @throws c10::ValueError if the norms of q, k and v of a block differ: no plain Transformer has
  ///   these weights.
  MUDDFormer plain_twin() const;

  /// The parameters of the connections, which usually have no weight decay.
  std::vector<at::Tensor> connection_parameters() const { return connections.parameters(); }

  MUDDFormerConfig config;
  torch::nn::ModuleList layers;
  Connections connections;
  Embedding tok_embeddings{nullptr};
  RotaryEmbedding rotary{nullptr};
  Norm norm{nullptr};
  /// Empty with tie_word_embeddings.
  Linear output{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(at::Tensor())},
                           {2, torch::nn::AnyValue(static_cast<KVCache*>(nullptr))})

 private:
  at::Tensor embed(const at::Tensor& input_ids);

  at::TensorOptions options_;
};

TORCH_MODULE(MUDDFormer);

}  // namespace muddformer
