// Small models of every variant (tests/variants.json, which the Python tests read too), shared by
// the C++ tests.
#pragma once

#include <ATen/core/grad_mode.h>
#include <muddformer/models.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <vector>

namespace muddformer::samples {

struct Variant {
  std::string name;
  MUDDFormerConfig config;
};

inline std::ostream& operator<<(std::ostream& out, const Variant& variant) {
  return out << variant.name;
}

/// In the order of the file, the small model itself first, as "default".
inline const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = [] {
    std::ifstream file(MUDDFORMER_TEST_VARIANTS);
    const auto parsed = nlohmann::ordered_json::parse(file);
    std::vector<Variant> read;
    for (const auto& [name, changes] : parsed.at("variants").items()) {
      auto fields = parsed.at("small");
      fields.update(changes);
      read.push_back({name, MUDDFormerConfig::from_json(fields.dump())});
    }
    return read;
  }();
  return all;
}

inline MUDDFormerConfig variant(const std::string& name) {
  const auto found = std::find_if(variants().begin(), variants().end(),
                                  [&](const Variant& variant) { return variant.name == name; });
  TORCH_CHECK(found != variants().end(), "tests/variants.json has no ", name);
  return found->config;
}

inline MUDDFormerConfig small() {
  return variant("default");
}

/// A model whose parameters have been moved off their initial values, so that each one counts.
inline MUDDFormer scrambled(const MUDDFormerConfig& config, double by = 0.2,
                            at::TensorOptions options = {}, uint64_t seed = 0) {
  torch::manual_seed(seed);
  MUDDFormer model(config, options);
  const at::NoGradGuard no_grad;
  for (at::Tensor& parameter : model->parameters()) {
    parameter.add_(torch::randn_like(parameter), by);
  }
  return model;
}

}  // namespace muddformer::samples
