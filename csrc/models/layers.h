// The blocks of all families: attention with rotary positions, feed-forward networks.
//
// B, T: batch and sequence length; D: model width; H: heads; E: width of a head. The
// conventions of modules are those of nn/matrices.h.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "../nn/connections.h"
#include "../nn/matrices.h"
#include "../nn/norm.h"
#include "config.h"
#include "kv_cache.h"

namespace muddformer {

/// The kind of the norms over the model width, config.norm of a checked() configuration.
///
/// @throws c10::ValueError if it has no value or an unknown one.
MUDDFORMER_API NormKind norm_kind(const MUDDFormerConfig& config);

/// Cosines and sines of T positions, float32 [T, rotary_dim / 2] each.
struct Rotary {
  at::Tensor cos, sin;
};

/// Tables of the cosines and sines of rotary positions, float32 [block_size, rotary_dim / 2] each.
///
/// They are neither parameters nor buffers: made at the first forward on a device, they follow the
/// weights wherever these go, stay float32 in a bfloat16 model, and are in no checkpoint.
class MUDDFORMER_API RotaryEmbeddingImpl : public torch::nn::Cloneable<RotaryEmbeddingImpl> {
 public:
  /// @throws c10::ValueError for a wrong configuration.
  explicit RotaryEmbeddingImpl(const MUDDFormerConfig& config);
  void reset() override {}
  /// Of the positions from 0 to length - 1, length at most block_size, on `device`.
  ///
  /// @throws c10::ValueError for another length.
  Rotary forward(int64_t length, at::Device device);
  /// Of `positions`, int64 [T], on their device.
  ///
  /// @throws c10::TypeError for another dtype.
  Rotary forward_at(const at::Tensor& positions);
  void pretty_print(std::ostream& stream) const override;

 private:
  Rotary tables(at::Device device);

  int64_t positions_, half_;
  double base_;
  Rotary tables_;
  // In a pointer, because a module is copied when it is cloned.
  std::shared_ptr<std::mutex> lock_ = std::make_shared<std::mutex>();
};
TORCH_MODULE(RotaryEmbedding);

/// Rotates the first entries of every head by its position, in the half-split form: entry i pairs
/// with i + half.
///
/// @param x [B, T, H, E].
/// @param rotary float32 [T, half], half <= E / 2. The other E - 2 half entries pass through.
/// @return [B, T, H, E] in the dtype of x; computed in float32 (float64 for float64).
/// @throws c10::TypeError, c10::ValueError for undefined tables or other shapes.
MUDDFORMER_API at::Tensor apply_rotary(const at::Tensor& x, const Rotary& rotary);

/// Self-attention whose queries, keys and values may come from different streams.
class MUDDFORMER_API AttentionImpl : public torch::nn::Cloneable<AttentionImpl> {
 public:
  /// @param index number of the block from 0, the place of its keys and values in a cache.
  /// @throws c10::ValueError for a wrong configuration or index.
  AttentionImpl(const MUDDFormerConfig& config, int64_t index, at::TensorOptions options = {},
                bool initialize = true);
  void reset() override;
  void reset_parameters();

  /// Attends to this and earlier positions, without config.causal to all.
  ///
  /// @param xq normed stream [B, T, D] of the queries.
  /// @param xk that of the keys; the three may be one tensor.
  /// @param xv that of the values.
  /// @param rotary of the T positions.
  /// @param mask bool [T, length of the cache], true where a query sees a key. Undefined: among
  ///   the T, causal with config.causal.
  /// @param cache keys and values of earlier positions, or null.
  /// @return [B, T, D].
  at::Tensor forward(const at::Tensor& xq, const at::Tensor& xk, const at::Tensor& xv,
                     const Rotary& rotary, const at::Tensor& mask = {}, KVCache* cache = nullptr);

  Linear wq{nullptr}, wk{nullptr}, wv{nullptr}, wo{nullptr};
  /// Empty without use_qk_norm.
  Norm q_norm{nullptr}, k_norm{nullptr};

 private:
  std::tuple<at::Tensor, at::Tensor> norm_and_rotate(const at::Tensor& q, const at::Tensor& k,
                                                     const Rotary& rotary);

  MUDDFormerConfig config_;
  int64_t index_;
  at::TensorOptions options_;
};
TORCH_MODULE(Attention);

/// config.feed_forward: SwiGLU, `w2(silu(w1 x) * w3 x)`, or GELU, `w2(gelu(w1 x))`.
class MUDDFORMER_API FeedForwardImpl : public torch::nn::Cloneable<FeedForwardImpl> {
 public:
  /// @param width hidden width.
  /// @throws c10::ValueError for a wrong configuration or width.
  FeedForwardImpl(const MUDDFormerConfig& config, int64_t width, at::TensorOptions options = {},
                  bool initialize = true);
  void reset() override;
  void reset_parameters();
  /// [..., D] -> [..., D].
  ///
  /// @param residual [..., D], added to the result; undefined: none.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual = {});

  Linear w1{nullptr}, w2{nullptr};
  /// Of SwiGLU alone.
  Linear w3{nullptr};

 private:
  MUDDFormerConfig config_;
  int64_t width_;
  at::TensorOptions options_;
};
TORCH_MODULE(FeedForward);

/// A Transformer block: attention and feed-forward network, each after a norm and added to the
/// residual stream.
class MUDDFORMER_API BlockImpl : public torch::nn::Cloneable<BlockImpl> {
 public:
  /// @param index number of the block from 0.
  /// @param separate_norms the q, k and v streams have a norm each (`attention_norms`); false: one
  ///   `attention_norm` for all.
  /// @throws c10::ValueError for a wrong configuration or index.
  BlockImpl(const MUDDFormerConfig& config, int64_t index, bool separate_norms,
            at::TensorOptions options = {}, bool initialize = true);
  void reset() override;
  void reset_parameters();

  /// The next hidden state, from the streams that the history makes for this block's norms.
  ///
  /// @param rotary see AttentionImpl::forward().
  /// @param mask see AttentionImpl::forward().
  /// @param cache see AttentionImpl::forward().
  /// @return `A + FFN(Norm(A))` with `A = xr + Attention(...)`, or `A + FFN(Norm(xr))` with
  ///   use_parallel_residual; [B, T, D].
  at::Tensor forward(History& history, const Rotary& rotary, const at::Tensor& mask = {},
                     KVCache* cache = nullptr);
  /// The next hidden state, from streams that are ready but for the norms.
  ///
  /// @param streams (xq, xk, xv, xr), or one stream x for all four, [B, T, D] each.
  /// @throws c10::ValueError if streams are neither one nor four.
  at::Tensor forward(at::TensorList streams, const Rotary& rotary, const at::Tensor& mask = {},
                     KVCache* cache = nullptr);
  /// The norms of the four streams (xq, xk, xv, xr); the residual stream has none.
  std::vector<Norm> stream_norms() const;

  Attention attention{nullptr};
  FeedForward feed_forward{nullptr};
  /// One of the two is empty.
  Norm attention_norm{nullptr};
  Norms attention_norms{nullptr};
  Norm ffn_norm{nullptr};

 private:
  // From streams that have passed stream_norms().
  at::Tensor next(const std::vector<at::Tensor>& normed, const Rotary& rotary,
                  const at::Tensor& mask, KVCache* cache);

  MUDDFormerConfig config_;
  int64_t index_;
  bool separate_norms_;
  at::TensorOptions options_;
};
TORCH_MODULE(Block);

}  // namespace muddformer
