#include "kv_cache.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>

#include "../nn/checks.h"

namespace muddformer {

KVCache::KVCache(const MUDDFormerConfig& config, int64_t batch_size, int64_t length,
                 at::TensorOptions options) {
  const MUDDFormerConfig c = config.checked();
  TORCH_CHECK_VALUE(c.causal,
                    "causal must be true for a KVCache and for generation, because keys and values "
                    "of earlier tokens must not depend on later ones, got causal=false");
  check_integer("batch_size", batch_size);
  check_integer("length", length, c.block_size);
  keys_ = at::zeros({c.n_layer, batch_size, *c.n_kv_heads, length, c.head_dim()}, options);
  values_ = at::zeros_like(keys_);
  next_ = at::zeros({1}, options.dtype(at::kLong));
  slots_ = at::arange(length, options.dtype(at::kLong));
  positions_ = slots_;
}

std::pair<at::Tensor, at::Tensor> KVCache::advance(int64_t count) {
  TORCH_CHECK(!c10::GradMode::is_enabled(),
              "a KVCache works only without gradients: under torch::NoGradGuard or "
              "c10::InferenceMode");
  TORCH_CHECK_VALUE(used_ + count <= length(), "input_ids has ", count, " tokens, but of the ",
                    length(), " places of the cache ", used_, " are taken");
  prompt_ = used_ == 0;
  used_ += count;
  positions_ = next_ + slots_.narrow(0, 0, count);
  next_ += count;
  return {positions_, prompt_ ? at::Tensor() : slots_ <= positions_.unsqueeze(1)};
}

std::pair<at::Tensor, at::Tensor> KVCache::update(int64_t layer, const at::Tensor& k,
                                                  const at::Tensor& v) {
  const at::Tensor keys = keys_[layer], values = values_[layer];
  keys.index_copy_(2, positions_, k.to(keys.scalar_type()));
  values.index_copy_(2, positions_, v.to(values.scalar_type()));
  return prompt_ ? std::pair(k, v) : std::pair(keys, values);
}

}  // namespace muddformer
