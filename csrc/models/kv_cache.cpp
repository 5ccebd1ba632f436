#include "kv_cache.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <array>

#include "../nn/checks.h"
#include "../nn/operators.h"

namespace muddformer {

KVCache::KVCache(const MUDDFormerConfig& config, int64_t batch_size, int64_t length,
                 at::TensorOptions options) {
  const MUDDFormerConfig c = config.checked();
  TORCH_CHECK_VALUE(c.causal,
                    "causal must be true for a KVCache and for generation, because keys and values "
                    "of earlier tokens must not depend on later ones, got causal=false");
  check_integer("batch_size", batch_size);
  check_integer("length", length, c.block_size);
  check_dtype("options", options);
  // Made in inference mode it could not be used outside.
  const c10::InferenceMode normal(false);
  keys_ = at::zeros({c.n_layer, batch_size, *c.n_kv_heads, length, c.head_dim()}, options);
  values_ = at::zeros_like(keys_);
  next_ = at::zeros({1}, options.dtype(at::kLong));
  slots_ = at::arange(length, options.dtype(at::kLong));
}

void KVCache::check_fits(const MUDDFormerConfig& config, const at::Tensor& weight) const {
  const auto expect = [](const char* what, int64_t expected, int64_t got) {
    TORCH_CHECK_VALUE(expected == got, "cache must be one of this model with ", what, "=", expected,
                      ", got ", got);
  };
  expect("n_layer", config.n_layer, keys_.size(0));
  expect("n_kv_heads", *config.n_kv_heads, keys_.size(2));
  expect("head_dim", config.head_dim(), keys_.size(4));
  TORCH_CHECK_VALUE(length() <= config.block_size,
                    "cache must hold at most block_size=", config.block_size, " tokens, got ",
                    length());
  const at::Device device = weight.device();
  TORCH_CHECK_VALUE(keys_.device() == device, "cache must be on ", device, ", like the model, got ",
                    keys_.device());
  TORCH_CHECK_TYPE(autocasts(device.type()) || keys_.scalar_type() == weight.scalar_type(),
                   "cache must be ", weight.scalar_type(), ", like the model, got ",
                   keys_.scalar_type());
}

std::pair<at::Tensor, at::Tensor> KVCache::reserve(int64_t count) {
  TORCH_CHECK(!c10::GradMode::is_enabled(),
              "a KVCache works only without gradients: under torch::NoGradGuard or "
              "c10::InferenceMode");
  check_integer("count", count, kLargestInteger, 0);
  TORCH_CHECK_VALUE(used_ + count <= length(), "input_ids has ", count, " tokens, but of the ",
                    length(), " places of the cache ", used_, " are taken");
  prompt_ = used_ == 0;
  reserved_ = count;
  positions_ = next_ + slots_.narrow(0, 0, count);
  return {positions_, prompt_ ? at::Tensor() : slots_ <= positions_.unsqueeze(1)};
}

std::pair<at::Tensor, at::Tensor> KVCache::update(int64_t layer, const at::Tensor& k,
                                                  const at::Tensor& v) {
  check_integer("layer", layer, keys_.size(0) - 1, 0);
  TORCH_CHECK(positions_.defined(), "update() came before reserve()");
  const std::array<int64_t, 4> places = {batch_size(), keys_.size(2), positions_.size(0),
                                         keys_.size(4)};
  const auto check = [shape = at::IntArrayRef(places)](const char* name, const at::Tensor& tensor) {
    TORCH_CHECK_TYPE(tensor.defined(), name, " must be a tensor, got an undefined one");
    TORCH_CHECK_VALUE(tensor.sizes() == shape, name, " must have shape ", shape, ", got ",
                      tensor.sizes());
  };
  check("k", k);
  check("v", v);
  const at::Tensor keys = keys_[layer], values = values_[layer];
  keys.index_copy_(2, positions_, k.to(keys.scalar_type()));
  values.index_copy_(2, positions_, v.to(values.scalar_type()));
  return prompt_ ? std::pair(k, v) : std::pair(keys, values);
}

void KVCache::commit() {
  used_ += reserved_;
  next_ += reserved_;
  reserved_ = 0;
}

}  // namespace muddformer
