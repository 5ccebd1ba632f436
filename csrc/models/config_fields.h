// The fields of a configuration by name, in the order that files have: what JSON and copies go by.
#pragma once

namespace muddformer {

// Calls f(name, the field of each object) for the options of connections, of ConnectionOptions and
// MUDDFormerConfig alike.
template <class F, class... Objects>
void for_each_option(F&& f, Objects&... o) {
  f("dense", o.dense...);
  f("dynamic", o.dynamic...);
  f("multiway", o.multiway...);
  f("ways", o.ways...);
  f("source_stride", o.source_stride...);
  f("block_stride", o.block_stride...);
  f("window", o.window...);
  f("pre_norm", o.pre_norm...);
  f("post_norm", o.post_norm...);
  f("expand_last", o.expand_last...);
  f("round64", o.round64...);
  f("cap", o.cap...);
  f("gelu_approximate", o.gelu_approximate...);
  f("flush_interval", o.flush_interval...);
  f("residual_dtype", o.residual_dtype...);
}

// Calls f(name, field) for all fields of a MUDDFormerConfig.
template <class F, class Config>
void for_each_field(F&& f, Config& c) {
  f("model_type", c.model_type);
  f("norm", c.norm);
  f("feed_forward", c.feed_forward);
  f("causal", c.causal);
  f("vocab_size", c.vocab_size);
  f("block_size", c.block_size);
  f("n_layer", c.n_layer);
  f("n_head", c.n_head);
  f("n_kv_heads", c.n_kv_heads);
  f("dim", c.dim);
  f("intermediate_size", c.intermediate_size);
  f("ffn_reallocation", c.ffn_reallocation);
  f("norm_eps", c.norm_eps);
  f("rope_base", c.rope_base);
  f("rotary_pct", c.rotary_pct);
  f("use_qk_norm", c.use_qk_norm);
  f("use_parallel_residual", c.use_parallel_residual);
  f("use_linear_bias", c.use_linear_bias);
  f("tie_word_embeddings", c.tie_word_embeddings);
  f("initializer_range", c.initializer_range);
  f("separate_norms", c.separate_norms);
  for_each_option(f, c);
}

}  // namespace muddformer
