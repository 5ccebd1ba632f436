// The families of models: what a field of the configuration that is left out takes from
// model_type. A family is a line of this table and nothing else; models ask the fields.
#pragma once

#include <string_view>

namespace muddformer {

struct Family {
  std::string_view name;
  // See the fields of these names of MUDDFormerConfig.
  std::string_view norm, feed_forward;
  double norm_eps, rotary_pct;
  bool use_parallel_residual, use_linear_bias;
};

inline constexpr Family kFamilies[] = {
    {"muddformer", "rms", "swiglu", 1e-6, 1.0, false, false},  // Transformer++
    {"muddpythia", "layer", "gelu", 1e-5, 0.25, true, true},   // Pythia
};

}  // namespace muddformer
