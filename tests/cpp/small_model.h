// A small model of the tests, with parameters that are all off their initial values.
#pragma once

#include <ATen/core/grad_mode.h>
#include <muddformer/models.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <vector>

namespace muddformer::small_model {

inline MUDDFormerConfig config() {
  return {.vocab_size = 61,
          .block_size = 24,
          .n_layer = 3,
          .n_head = 4,
          .dim = 32,
          .intermediate_size = 48,
          .ffn_reallocation = false};
}

inline std::vector<MUDDFormerConfig> variants() {
  std::vector<MUDDFormerConfig> all(6, config());
  all[1].dense = false;
  all[2].model_type = "muddpythia";
  all[2].rotary_pct = 0.5;
  all[3].dynamic = all[3].multiway = false;
  all[4].source_stride = all[4].block_stride = 2;
  all[4].pre_norm = true;
  all[4].post_norm = "residual";
  all[5].window = 1;
  all[5].n_kv_heads = 2;
  all[5].tie_word_embeddings = true;
  return all;
}

inline MUDDFormer make(const MUDDFormerConfig& config, at::TensorOptions options = {}) {
  torch::manual_seed(0);
  MUDDFormer model(config, options);
  const at::NoGradGuard no_grad;
  for (at::Tensor& parameter : model->parameters()) {
    parameter.add_(torch::randn_like(parameter), 0.2);
  }
  return model;
}

}  // namespace muddformer::small_model
