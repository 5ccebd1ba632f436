#include "layers.h"

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../nn/checks.h"
#include "../nn/operators.h"
#include "../ops/qk_norm_rotary/qk_norm_rotary.h"
#include "../ops/swiglu/swiglu.h"

namespace muddformer {

NormKind norm_kind(const MUDDFormerConfig& config) {
  TORCH_CHECK_VALUE(config.norm.has_value(), "norm has no value: use checked()");
  check_choice("norm", *config.norm, {"rms", "layer"});
  return config.norm == "layer" ? NormKind::kLayerNorm : NormKind::kRMSNorm;
}

// ---- rotary positions ----

RotaryEmbeddingImpl::RotaryEmbeddingImpl(const MUDDFormerConfig& given) {
  const MUDDFormerConfig config = given.checked();
  positions_ = config.block_size;
  half_ = config.rotary_dim() / 2;
  base_ = config.rope_base;
}

Rotary RotaryEmbeddingImpl::tables(at::Device device) {
  const std::lock_guard<std::mutex> guard(*lock_);
  if (!tables_.cos.defined() || tables_.cos.device() != device) {
    // The first call may be one of inference mode, and a later one of training.
    const c10::InferenceMode normal(false);
    const at::TensorOptions options = at::TensorOptions(at::kFloat).device(device);
    const at::Tensor exponents = at::arange(half_, options) / half_;
    const at::Tensor frequencies = at::pow(base_, exponents).reciprocal();
    const at::Tensor angles = at::arange(positions_, options).unsqueeze(1) * frequencies;
    const Rotary made{angles.cos(), angles.sin()};
    // Later calls may come from other streams.
    if (device.is_cuda()) {
      c10::impl::VirtualGuardImpl(device.type()).getStream(device).synchronize();
    }
    tables_ = made;
  }
  return tables_;
}

Rotary RotaryEmbeddingImpl::forward(int64_t length, at::Device device) {
  check_integer("length", length, positions_, 0);
  const Rotary all = tables(device);
  return {all.cos.narrow(0, 0, length), all.sin.narrow(0, 0, length)};
}

Rotary RotaryEmbeddingImpl::forward_at(const at::Tensor& positions) {
  TORCH_CHECK_TYPE(positions.defined() && positions.scalar_type() == at::kLong,
                   "positions must be int64, got ",
                   positions.defined() ? c10::toString(positions.scalar_type()) : "no tensor");
  const Rotary all = tables(positions.device());
  return {all.cos.index_select(0, positions), all.sin.index_select(0, positions)};
}

void RotaryEmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "muddformer::RotaryEmbedding(positions=" << positions_ << ", rotary_dim=" << 2 * half_
         << ", base=" << base_ << ')';
}

at::Tensor apply_rotary(const at::Tensor& x, const Rotary& rotary) {
  TORCH_CHECK_VALUE(x.dim() == 4, "x must be [B, T, H, E], got shape ", x.sizes());
  TORCH_CHECK_TYPE(rotary.cos.defined() && rotary.sin.defined(),
                   "rotary must have two tensors, got an undefined one");
  TORCH_CHECK_VALUE(rotary.cos.dim() == 2 && rotary.cos.size(0) == x.size(1) &&
                        2 * rotary.cos.size(1) <= x.size(3) &&
                        rotary.sin.sizes() == rotary.cos.sizes(),
                    "rotary must be [T, half] with T = ", x.size(1), " and half at most ",
                    x.size(3) / 2, ", got ", rotary.cos.sizes(), " and ", rotary.sin.sizes());
  const int64_t half = rotary.cos.size(-1), width = x.size(-1);
  const at::Tensor cos = rotary.cos.unsqueeze(1), sin = rotary.sin.unsqueeze(1);
  const at::Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
  const at::Tensor first = (a * cos - b * sin).to(x.scalar_type());
  const at::Tensor second = (a * sin + b * cos).to(x.scalar_type());
  if (2 * half == width) return at::cat({first, second}, -1);
  return at::cat({first, second, x.narrow(-1, 2 * half, width - 2 * half)}, -1);
}

// ---- attention, feed-forward network, block ----

AttentionImpl::AttentionImpl(const MUDDFormerConfig& config, int64_t index,
                             at::TensorOptions options, bool initialize)
    : Cloneable("muddformer::Attention"),
      config_(config.checked()),
      index_(index),
      options_(options) {
  check_integer("index", index_, config_.n_layer - 1, 0);
  reset();
  if (initialize) reset_parameters();
}

void AttentionImpl::reset() {
  const MUDDFormerConfig& c = config_;
  const auto linear = [&](const char* name, int64_t out) {
    return register_module(
        name, Linear(c.dim, out, *c.use_linear_bias, c.initializer_range, options_, false));
  };
  const auto norm = [&](const char* name) {
    return register_module(
        name, Norm(c.head_dim(), *c.norm_eps, NormKind::kRMSNorm, 1.0, options_, false));
  };
  wq = linear("wq", c.dim);
  wk = linear("wk", *c.n_kv_heads * c.head_dim());
  wv = linear("wv", *c.n_kv_heads * c.head_dim());
  wo = linear("wo", c.dim);
  if (c.use_qk_norm) {
    q_norm = norm("q_norm");
    k_norm = norm("k_norm");
  }
}

void AttentionImpl::reset_parameters() {
  for (const Linear& linear : {wq, wk, wv, wo}) linear.ptr()->reset_parameters();
  for (const Norm& norm : {q_norm, k_norm}) {
    if (norm) norm.ptr()->reset_parameters();
  }
}

at::Tensor AttentionImpl::forward(const at::Tensor& xq, const at::Tensor& xk, const at::Tensor& xv,
                                  const Rotary& rotary, const at::Tensor& mask, KVCache* cache) {
  const std::array<int64_t, 2> heads = {-1, config_.head_dim()};
  at::Tensor q = wq->forward(xq).unflatten(-1, heads);
  at::Tensor k = wk->forward(xk).unflatten(-1, heads);
  at::Tensor v = wv->forward(xv).unflatten(-1, heads);
  std::tie(q, k) = norm_and_rotate(q, k, rotary);
  q = q.transpose(1, 2);
  k = k.transpose(1, 2);
  v = v.transpose(1, 2);
  if (cache != nullptr) std::tie(k, v) = cache->update(index_, k, v);
  const auto seen = mask.defined() ? std::optional(mask) : std::nullopt;
  const at::Tensor y = at::scaled_dot_product_attention(
      q, k, v, seen, /*dropout_p=*/0.0, /*is_causal=*/!seen && config_.causal,
      /*scale=*/std::nullopt, /*enable_gqa=*/*config_.n_kv_heads != config_.n_head);
  return wo->forward(y.transpose(1, 2).flatten(-2));
}

std::tuple<at::Tensor, at::Tensor> AttentionImpl::norm_and_rotate(const at::Tensor& q,
                                                                  const at::Tensor& k,
                                                                  const Rotary& rotary) {
  const at::ScalarType dtype = q.scalar_type();
  if (runs_operators(q) &&
      (!q_norm || (fits_beside(q_norm->weight, dtype) && fits_beside(k_norm->weight, dtype)))) {
    if (!q_norm) return qk_norm_rotary(q, k, rotary.cos, rotary.sin);
    return qk_norm_rotary(q, k, rotary.cos, rotary.sin, q_norm->weight, k_norm->weight,
                          q_norm->eps());
  }
  if (!q_norm) return {apply_rotary(q, rotary), apply_rotary(k, rotary)};
  return {apply_rotary(q_norm->forward(q), rotary), apply_rotary(k_norm->forward(k), rotary)};
}

FeedForwardImpl::FeedForwardImpl(const MUDDFormerConfig& config, int64_t width,
                                 at::TensorOptions options, bool initialize)
    : Cloneable("muddformer::FeedForward"),
      config_(config.checked()),
      width_(width),
      options_(options) {
  check_integer("width", width_);
  reset();
  if (initialize) reset_parameters();
}

void FeedForwardImpl::reset() {
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, Linear(in, out, *config_.use_linear_bias,
                                        config_.initializer_range, options_, false));
  };
  w1 = linear("w1", config_.dim, width_);
  w2 = linear("w2", width_, config_.dim);
  if (config_.feed_forward == "swiglu") w3 = linear("w3", config_.dim, width_);
}

void FeedForwardImpl::reset_parameters() {
  w1->reset_parameters();
  w2->reset_parameters();
  if (w3) w3->reset_parameters();
}

at::Tensor FeedForwardImpl::forward(const at::Tensor& x, const at::Tensor& residual) {
  const at::Tensor gate = w1->forward(x);
  if (!w3) return w2->forward(at::gelu(gate, config_.gelu_approximate), residual);
  const at::Tensor up = w3->forward(x);
  return w2->forward(runs_operators(gate) ? swiglu(gate, up) : at::silu(gate) * up, residual);
}

BlockImpl::BlockImpl(const MUDDFormerConfig& config, int64_t index, bool separate_norms,
                     at::TensorOptions options, bool initialize)
    : Cloneable("muddformer::Block"),
      config_(config.checked()),
      index_(index),
      separate_norms_(separate_norms),
      options_(options) {
  check_integer("index", index_, config_.n_layer - 1, 0);
  reset();
  if (initialize) reset_parameters();
}

void BlockImpl::reset() {
  const MUDDFormerConfig& c = config_;
  const NormKind kind = norm_kind(c);
  const int64_t width = c.ffn_widths()[static_cast<size_t>(index_)];
  attention = register_module("attention", Attention(c, index_, options_, false));
  feed_forward = register_module("feed_forward", FeedForward(c, width, options_, false));
  if (separate_norms_) {
    attention_norms = register_module(
        "attention_norms",
        Norms(std::vector<int64_t>{0, 1, 2}, c.dim, *c.norm_eps, kind, 1.0, options_, false));
  } else {
    attention_norm =
        register_module("attention_norm", Norm(c.dim, *c.norm_eps, kind, 1.0, options_, false));
  }
  ffn_norm = register_module("ffn_norm", Norm(c.dim, *c.norm_eps, kind, 1.0, options_, false));
}

void BlockImpl::reset_parameters() {
  attention->reset_parameters();
  feed_forward->reset_parameters();
  if (separate_norms_) {
    attention_norms->reset_parameters();
  } else {
    attention_norm->reset_parameters();
  }
  ffn_norm->reset_parameters();
}

std::vector<Norm> BlockImpl::stream_norms() const {
  if (!separate_norms_) return {attention_norm, attention_norm, attention_norm, Norm(nullptr)};
  return {attention_norms->at(0), attention_norms->at(1), attention_norms->at(2), Norm(nullptr)};
}

at::Tensor BlockImpl::forward(History& history, const Rotary& rotary, const at::Tensor& mask,
                              KVCache* cache) {
  return next(history.streams(stream_norms()), rotary, mask, cache);
}

at::Tensor BlockImpl::forward(at::TensorList streams, const Rotary& rotary, const at::Tensor& mask,
                              KVCache* cache) {
  TORCH_CHECK_VALUE(streams.size() == 1 || streams.size() == 4,
                    "streams must be one tensor or four (xq, xk, xv, xr), got ", streams.size());
  return next(normed(streams, stream_norms()), rotary, mask, cache);
}

at::Tensor BlockImpl::next(const std::vector<at::Tensor>& normed, const Rotary& rotary,
                           const at::Tensor& mask, KVCache* cache) {
  const at::Tensor& residual = normed[3];
  const at::Tensor attended =
      attention->forward(normed[0], normed[1], normed[2], rotary, mask, cache);
  if (*config_.use_parallel_residual) {
    return feed_forward->forward(ffn_norm->forward(residual), residual + attended);
  }
  const auto [x, read] = ffn_norm->forward_sum(attended, residual);
  return feed_forward->forward(read, x);
}

}  // namespace muddformer
