// Small models of every variant (spec sections 1 to 5), shared by the C++ tests.
#pragma once

#include <muddformer/models.h>

#include <ostream>
#include <string>
#include <utility>
#include <vector>

namespace muddformer::samples {

struct Variant {
  std::string name;
  MUDDFormerConfig config;
};

inline std::ostream& operator<<(std::ostream& out, const Variant& variant) {
  return out << variant.name;
}

inline MUDDFormerConfig small() {
  MUDDFormerConfig c;
  c.n_layer = 5;
  c.dim = 32;
  c.n_head = 4;
  c.vocab_size = 61;
  c.intermediate_size = 48;
  c.block_size = 24;
  c.ffn_reallocation = false;
  c.rotary_pct = 1.0;
  return c;
}

inline std::vector<Variant> variants() {
  std::vector<Variant> all;
  const auto add = [&](const char* name, auto&& change) {
    all.push_back({name, small()});
    change(all.back().config);
  };
  using C = MUDDFormerConfig;
  const auto pre_post = [](C& c) {
    c.pre_norm = true;
    c.post_norm = "residual";
  };
  add("default", [](C&) {});
  add("pythia", [](C& c) {
    c.model_type = "muddpythia";
    c.rotary_pct = 0.5;
  });
  add("pythia_sequential", [](C& c) {
    c.model_type = "muddpythia";
    c.use_parallel_residual = c.use_linear_bias = false;
  });
  add("parallel_biased", [](C& c) { c.use_parallel_residual = c.use_linear_bias = true; });
  add("plain", [](C& c) { c.dense = false; });
  add("plain_pythia", [](C& c) {
    c.model_type = "muddpythia";
    c.dense = false;
  });
  add("static", [](C& c) { c.dynamic = false; });
  add("denseformer", [](C& c) { c.dynamic = c.multiway = false; });
  add("one_way", [](C& c) { c.multiway = false; });
  add("cap", [](C& c) { c.cap = 10; });
  add("static_cap", [](C& c) {
    c.dynamic = false;
    c.cap = 3;
  });
  add("tanh", [](C& c) {
    c.model_type = "muddpythia";
    c.gelu_approximate = "tanh";
  });
  add("ways_qkv", [](C& c) { c.ways = "qkv"; });
  add("ways_v", [](C& c) { c.ways = "v"; });
  add("ways_rq_pre_post", [&](C& c) {
    pre_post(c);
    c.ways = "rq";
  });
  add("stride_2x2", [](C& c) { c.source_stride = c.block_stride = 2; });
  add("stride_3x2_pre_post", [&](C& c) {
    pre_post(c);
    c.source_stride = 3;
    c.block_stride = 2;
  });
  add("stride_1x3_one_way", [](C& c) {
    c.block_stride = 3;
    c.multiway = false;
  });
  add("flush_2", [](C& c) { c.flush_interval = 2; });
  add("flush_3_prepost", [&](C& c) {
    c.flush_interval = 3;
    pre_post(c);
  });
  add("window_1", [](C& c) { c.window = 1; });
  add("window_2_stride_2", [](C& c) {
    c.window = 2;
    c.source_stride = 2;
  });
  add("pre_post", pre_post);
  add("pre_post_all_one_way", [](C& c) {
    c.pre_norm = true;
    c.post_norm = "all";
    c.multiway = false;
  });
  add("post", [](C& c) { c.post_norm = "residual"; });
  add("shared_norms", [](C& c) { c.separate_norms = false; });
  add("narrow", [](C& c) { c.expand_last = c.round64 = false; });
  add("no_qk_norm", [](C& c) { c.use_qk_norm = false; });
  add("grouped_queries", [](C& c) { c.n_kv_heads = 2; });
  add("tied_one_kv_head", [](C& c) {
    c.n_kv_heads = 1;
    c.tie_word_embeddings = true;
  });
  add("reallocation", [](C& c) {
    c.ffn_reallocation = true;
    c.intermediate_size = 256;
  });
  add("one_layer", [](C& c) { c.n_layer = 1; });
  return all;
}

}  // namespace muddformer::samples
