// The models against cases computed by the public PyTorch release: every golden/*.safetensors.
#include <gtest/gtest.h>
#include <muddformer/inference/generation.h>
#include <muddformer/io/safetensors.h>
#include <muddformer/models.h>
#include <torch/torch.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace muddformer {
namespace {

using at::Tensor;
using Tensors = std::map<std::string, Tensor>;
namespace fs = std::filesystem;

std::vector<std::string> golden_cases() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(MUDDFORMER_TEST_DATA)) {
    if (entry.path().extension() == ".safetensors") names.push_back(entry.path().stem().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class Golden : public testing::TestWithParam<std::string> {
 protected:
  Golden() : file(fs::path(MUDDFORMER_TEST_DATA) / (GetParam() + ".safetensors")) {
    for (const auto& [name, entry] : file.entries()) tensors[name] = file.tensor(name);
    const auto& metadata = file.metadata();
    // The family is a text of its own; it goes first into the configuration's JSON.
    std::string json = metadata.at("config");
    json.insert(json.find('{') + 1, "\"model_type\": \"" + metadata.at("model") + "\", ");
    config = MUDDFormerConfig::from_official_json(json);
    const auto gelu = metadata.find("gelu");
    if (gelu != metadata.end() && gelu->second == "tanh") config.gelu_approximate = "tanh";
  }

  MUDDFormer model(at::ScalarType dtype) const {
    MUDDFormer model(config, dtype);
    const torch::NoGradGuard no_grad;
    auto parameters = model->named_parameters();
    size_t stored = 0;
    for (const auto& [name, value] : tensors) {
      if (name.rfind("param/", 0) != 0) continue;
      parameters[name.substr(6)].copy_(value);
      ++stored;
    }
    EXPECT_EQ(stored, parameters.size());
    return model;
  }

  // Logits, loss and all gradients, in float64.
  Tensors run(at::ScalarType dtype) const {
    MUDDFormer run_model = model(dtype);
    Tensors found;
    found["logits"] = run_model->forward(tensors.at("input_ids"));
    found["loss"] = run_model->forward(tensors.at("input_ids"), tensors.at("targets"));
    found["loss"].backward();
    for (const auto& item : run_model->named_parameters()) {
      found["grad/" + item.key()] = item.value().grad();
    }
    for (auto& [name, value] : found) value = value.detach().to(at::kDouble);
    return found;
  }

  SafetensorsFile file;
  Tensors tensors;
  MUDDFormerConfig config;
};

double largest(const Tensor& x) {
  return x.abs().max().item<double>();
}

TEST_P(Golden, LogitsLossAndGradients) {
  const Tensors found = run(at::kFloat), exact = run(at::kDouble);
  double largest_grad = 0, largest_error = 0;
  for (const auto& [name, actual] : found) {
    const Tensor value = tensors.at(name).to(at::kDouble).view(actual.sizes());
    const double scale = largest(value);
    // A case has rounding errors of its own, which its random priors amplify: its gradients are up
    // to 5e-5 from the float64 ones. Where that is more than 1e-5, float32 has to be as near to it
    // as two such errors allow.
    const double rounding = largest(value - exact.at(name));
    EXPECT_LE(rounding, 1e-4 * scale) << name;
    EXPECT_LE(largest(actual - value), std::max(1e-5 * scale, 2 * rounding)) << name;
    EXPECT_LE(largest(actual - exact.at(name)), std::max(1e-5 * scale, 1.5 * rounding)) << name;
    if (name.rfind("grad/", 0) == 0) {
      largest_grad = std::max(largest_grad, scale);
      largest_error = std::max(largest_error, largest(actual - value));
    } else {
      EXPECT_LE(largest(actual - value), 1e-5 * scale) << name;
    }
  }
  EXPECT_LE(largest_error, 1e-5 * largest_grad);
}

TEST_P(Golden, GreedyTokens) {
  const Tensor &prompt = tensors.at("prompt"), &expected = tensors.at("greedy_ids");
  GenerateOptions options;
  options.max_new_tokens = expected.size(1) - prompt.size(1);
  EXPECT_TRUE(at::equal(generate(model(at::kFloat), prompt, options), expected));
}

INSTANTIATE_TEST_SUITE_P(Cases, Golden, testing::ValuesIn(golden_cases()),
                         [](const auto& info) { return info.param; });

TEST(GoldenCases, AreThere) {
  EXPECT_GE(golden_cases().size(), 2u);
}

}  // namespace
}  // namespace muddformer
