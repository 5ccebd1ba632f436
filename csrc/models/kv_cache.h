// Keys and values of earlier tokens, for decoding.
//
// The hidden states that MUDD connections mix belong to one token, so a decode step makes those of
// its own token anew and needs nothing of earlier tokens but their keys and values.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <utility>

#include "config.h"

namespace muddformer {

/// Keys and values of all blocks, allocated once: [L, B, key/value heads, length, head width] each.
///
/// Shapes do not depend on how many tokens are in the cache, and the next position is kept on the
/// device. Give it to `model->forward(input_ids, {}, &cache)`, first with the prompt, then with
/// what follows. Without gradients only (torch::NoGradGuard or c10::InferenceMode).
class MUDDFORMER_API KVCache {
 public:
  /// @param config the model's configuration.
  /// @param batch_size number of sequences B.
  /// @param length number of tokens that it holds, at most config.block_size.
  /// @param options dtype and device of the model's parameters.
  /// @throws c10::ValueError, c10::TypeError naming the argument or field, what was expected and what
  ///   came: a model that is not causal has no cache.
  KVCache(const MUDDFormerConfig& config, int64_t batch_size, int64_t length,
          at::TensorOptions options = {});
  // A copy would share the tensors and not the count of what is in them.
  KVCache(const KVCache&) = delete;
  KVCache& operator=(const KVCache&) = delete;
  KVCache(KVCache&&) = default;
  KVCache& operator=(KVCache&&) = default;

  /// Number of tokens that are in the cache.
  int64_t used() const { return used_; }
  /// Number of sequences B.
  int64_t batch_size() const { return keys_.size(1); }
  /// Number of tokens that it holds.
  int64_t length() const { return slots_.size(0); }

  /// Checks that a model can use it.
  ///
  /// @param config the model's configuration, checked.
  /// @param weight a parameter of the model.
  /// @throws c10::ValueError, c10::TypeError if it has other blocks, heads or places, or another
  ///   device or, without autocast, dtype.
  void check_fits(const MUDDFormerConfig& config, const at::Tensor& weight) const;

  /// The places of the next `count` tokens, which are in the cache after commit().
  ///
  /// @return (positions, mask): their positions, int64 [count], and which slots of the cache they
  ///   see, bool [count, length]; an undefined mask for the first ones, which see each other
  ///   causally.
  /// @throws c10::ValueError if the cache is too short or count less than 0, c10::Error if gradients
  ///   are enabled.
  std::pair<at::Tensor, at::Tensor> reserve(int64_t count);

  /// Stores keys and values [B, heads, count, head width] of one block, after reserve(count).
  ///
  /// @param layer number of the block from 0.
  /// @return the keys and values to attend to: those given for the first tokens, or else of the
  ///   whole cache [B, heads, length, head width], of which the mask of reserve() says what is
  ///   seen.
  /// @throws c10::ValueError, c10::TypeError for a block that the model does not have, or tensors that
  ///   are undefined or of another shape; c10::Error before reserve().
  std::pair<at::Tensor, at::Tensor> update(int64_t layer, const at::Tensor& k, const at::Tensor& v);

  /// Keeps the tokens of the last reserve(), when update() has stored them for all blocks.
  void commit();

 private:
  at::Tensor keys_, values_;
  at::Tensor next_, slots_, positions_;
  int64_t used_ = 0, reserved_ = 0;
  bool prompt_ = true;
};

}  // namespace muddformer
