// The models on a GPU, where layers are made by fused kernels (normed streams, connection weights,
// decoding), beside the same models on the CPU, which compose them of single steps.
#include <ATen/core/dispatch/Dispatcher.h>
#include <gtest/gtest.h>
#include <muddformer/models.h>
#include <torch/cuda.h>
#include <torch/torch.h>

#include <algorithm>
#include <map>
#include <ostream>
#include <string>
#include <vector>

#include "autocast.h"
#include "files.h"
#include "variants.h"

namespace muddformer {
namespace {

using at::Tensor;
using testing_autocast::Autocast;

constexpr int64_t kVocabulary = 61;

std::string no_gpu() {
  if (!torch::cuda::is_available()) return "needs a GPU";
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("muddformer::depth_aggregate", "");
  const bool built = op.hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return built ? "" : "needs a muddformer that was built with CUDA kernels";
}

#define SKIP_WITHOUT_GPU() \
  if (const std::string reason = no_gpu(); !reason.empty()) GTEST_SKIP() << reason

// Parameters moved off their initial values, yet not so far that rounding is magnified by much.
MUDDFormer scrambled(MUDDFormerConfig config, at::ScalarType dtype, uint64_t seed = 0) {
  config.dim = 64;
  config.block_size = 48;
  MUDDFormer model = samples::scrambled(config, 0.05, {}, seed);
  model->to(dtype);
  return model;
}

MUDDFormer copy(const MUDDFormer& model, at::Device device, at::ScalarType dtype) {
  MUDDFormer clone(std::dynamic_pointer_cast<MUDDFormerImpl>(model->clone()));
  clone->to(device, dtype);
  return clone;
}

Tensor some_ids(int64_t batch, int64_t length) {
  torch::manual_seed(1);
  return torch::randint(kVocabulary, {batch, length}, at::kLong);
}

double distance(const Tensor& left, const Tensor& right) {
  return (left.detach().cpu().to(at::kDouble) - right.detach().cpu().to(at::kDouble))
      .norm()
      .item<double>();
}

// Rounding of a few steps, relative to the norm of a result.
double floor_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return 8 * 0x1p-8;
    case at::kHalf:
      return 8 * 0x1p-11;
    case at::kFloat:
      return 1e-5;
    default:
      return 1e-12;
  }
}

// Distances from the result in float64 on the CPU, whose norm it is.
struct Near {
  double got, composed, norm;
};

// Of `got`, on the GPU, and of `composed`, the same computation in the same dtype on the CPU.
Near measure(const std::string& name, const Tensor& got, const Tensor& composed,
             const Tensor& exact) {
  if (!got.defined()) {
    ADD_FAILURE() << name << " is not defined";
    return {};
  }
  EXPECT_TRUE(got.is_cuda()) << name;
  EXPECT_EQ(got.sizes(), exact.sizes()) << name;
  return {distance(got, exact), distance(composed, exact), exact.norm().item<double>()};
}

// `got` is at most `factor` times as far off as `composed`, and `floor` of the norm.
void expect_near(const std::string& name, const Near& near, double factor, double floor) {
  const double limit = factor * near.composed + floor * near.norm + 1e-12;
  EXPECT_LE(near.got, limit) << name << ", norm " << near.norm;
}

void expect_near(const std::string& name, const Tensor& got, const Tensor& composed,
                 const Tensor& exact, double factor) {
  expect_near(name, measure(name, got, composed, exact), factor, floor_of(composed.scalar_type()));
}

// A model's gradients by name. Those of the static weights are one entry: each is a few sums that
// cancel over all tokens, so that the error of one alone is near zero by chance.
std::map<std::string, Tensor> gradients(const MUDDFormer& model) {
  std::map<std::string, Tensor> named;
  std::vector<Tensor> static_weights;
  for (const auto& item : model->named_parameters()) {
    const Tensor& gradient = item.value().grad();
    if (item.key().starts_with("dense_bs.") && gradient.defined()) {
      static_weights.push_back(gradient.flatten());
    } else {
      named[item.key()] = gradient;
    }
  }
  if (!static_weights.empty()) named["dense_bs"] = at::cat(static_weights);
  return named;
}

class CudaModels : public testing::TestWithParam<at::ScalarType> {
 protected:
  void set_models(const MUDDFormerConfig& config, uint64_t seed = 0) {
    composed = scrambled(config, GetParam(), seed);
    exact = copy(composed, at::kCPU, at::kDouble);
    model = copy(composed, at::kCUDA, GetParam());
  }

  // Calls check(variant) for every variant (that has a cache, if it needs one), with its models in
  // place.
  template <class Check>
  void for_each_variant(const Check& check, bool needs_cache = false) {
    SKIP_WITHOUT_GPU();
    for (const samples::Variant& variant : samples::variants()) {
      if (needs_cache && !variant.config.causal) continue;
      SCOPED_TRACE(variant.name);
      set_models(variant.config);
      check(variant);
    }
  }

  // On the CPU, there in float64, and on the GPU.
  MUDDFormer composed{nullptr}, exact{nullptr}, model{nullptr};
};

// 80 tokens: more than count as decoding. A model of small hidden states may make much of a rounding:
// with some parameters and tokens the gradients of 16 bits are a few times as far off as with most,
// on any device. So the middle one of several draws counts, of each side: three leave a gradient
// that rounding has made most of to chance, so 16 bits have nine.
TEST_P(CudaModels, LossLogitsAndGradients) {
  const int count = at::elementSize(GetParam()) == 2 ? 9 : 3;
  const Tensor ids = some_ids(2, 40);
  const auto pass = [](MUDDFormer& m, const Tensor& tokens) {
    const at::Device device = m->tok_embeddings->weight.device();
    const Tensor loss = m->forward(tokens.to(device), tokens.roll(-1, 1).to(device));
    loss.backward();
    std::map<std::string, Tensor> results = gradients(m);
    results["loss"] = loss;
    results["logits"] = m->forward(tokens.to(device));
    const torch::NoGradGuard no_grad;
    results["logits without gradients"] = m->forward(tokens.to(device));
    return results;
  };
  const auto middle = [](std::vector<Near>& draws, double Near::* of) {
    std::sort(draws.begin(), draws.end(),
              [of](const Near& left, const Near& right) { return left.*of < right.*of; });
    return draws[draws.size() / 2].*of;
  };
  for_each_variant([&](const samples::Variant& variant) {
    std::map<std::string, std::vector<Near>> by_name;
    for (int draw = 0; draw < count; ++draw) {
      if (draw > 0) set_models(variant.config, draw);
      const Tensor tokens = ids.roll(draw, 1);
      const auto got = pass(model, tokens), theirs = pass(composed, tokens),
                 wanted = pass(exact, tokens);
      EXPECT_EQ(got.at("logits").scalar_type(), GetParam());
      for (const auto& [name, value] : got) {
        by_name[name].push_back(measure(name, value, theirs.at(name), wanted.at(name)));
      }
    }
    for (auto& [name, draws] : by_name) {
      const Near near{middle(draws, &Near::got), middle(draws, &Near::composed),
                      middle(draws, &Near::norm)};
      const bool output = name == "loss" || name.starts_with("logits");
      // A float32 mean over tokens: what rounding the logits leaves of it is small and random.
      expect_near(name, near, output ? 2 : 3, floor_of(GetParam()) / (name == "loss" ? 64 : 1));
    }
  });
}

// At most 64 tokens at a time: a prompt, several tokens and single ones, with a cache.
TEST_P(CudaModels, CachedDecoding) {
  const torch::NoGradGuard no_grad;
  const Tensor ids = some_ids(2, 24);
  const auto decode = [&](MUDDFormer& m) {
    const at::TensorOptions options = m->tok_embeddings->weight.options();
    KVCache cache(m->config, 2, 24, options);
    std::vector<Tensor> parts;
    for (const Tensor& part : ids.split({9, 4, 1, 1, 9}, 1)) {
      parts.push_back(m->forward(part.to(options.device()), {}, &cache));
    }
    return at::cat(parts, 1);
  };
  for_each_variant(
      [&](const samples::Variant&) {
        expect_near("logits", decode(model), decode(composed), exact->forward(ids), 2);
      },
      /*needs_cache=*/true);
}

// Every token is among the likeliest of a pass without a cache, but for rounding; in float32, where
// ties are improbable, it is the same token.
TEST_P(CudaModels, GenerationWithCache) {
  const torch::NoGradGuard no_grad;
  const Tensor prompt = some_ids(3, 7);
  for_each_variant(
      [&](const samples::Variant&) {
        const Tensor ids = generate(model, prompt.cuda(), {.max_new_tokens = 16});
        ASSERT_EQ(ids.sizes(), (std::vector<int64_t>{3, 23}));
        const Tensor logits = model->forward(ids.slice(1, 0, 22)).slice(1, 6).to(at::kDouble);
        const Tensor chosen = logits.gather(2, ids.slice(1, 7).unsqueeze(2)).squeeze(2);
        const double lost = (logits.amax(2) - chosen).max().item<double>();
        EXPECT_LE(lost, 4 * floor_of(GetParam()) * logits.abs().max().item<double>());
        if (GetParam() != at::kFloat) return;
        EXPECT_TRUE(at::equal(logits.argmax(2), ids.slice(1, 7)));
        EXPECT_TRUE(at::equal(ids.cpu(), generate(composed, prompt, {.max_new_tokens = 16})));
      },
      /*needs_cache=*/true);
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CudaModels, testing::Values(at::kFloat, at::kBFloat16, at::kHalf),
                         [](const auto& info) { return c10::toString(info.param); });

// One layer with the norms of its streams, fused, beside the layer and then the norms, on the GPU.
struct LayerCase {
  const char* name;
  NormKind kind;
  bool pre_norm;
  const char* post_norm;
  const char* ways;
};

std::ostream& operator<<(std::ostream& out, const LayerCase& layer) {
  return out << layer.name;
}

class CudaLayers : public testing::TestWithParam<LayerCase> {};

TEST_P(CudaLayers, FusedNormsEqualNormsAfterwards) {
  SKIP_WITHOUT_GPU();
  const LayerCase& c = GetParam();
  const int64_t dim = 128, sources = 5;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const int64_t tokens : {1, 7, 200}) {
      torch::manual_seed(2);
      const at::TensorOptions options = at::TensorOptions(dtype).device(at::kCUDA);
      DepthAggregation layer(
          DepthAggregationOptions{
              .dim = dim,
              .sources = sources,
              .ways = std::string(c.ways),
              .connections = {.pre_norm = c.pre_norm, .post_norm = c.post_norm, .round64 = false}},
          options);
      std::vector<Norm> norms;
      for (int way = 0; way < 3; ++way) norms.emplace_back(dim, 1e-6, c.kind, 1.0, options);
      norms.emplace_back(nullptr);
      std::vector<Tensor> leaves = layer->parameters();
      for (int way = 0; way < 3; ++way) {
        for (const Tensor& parameter : norms[way]->parameters()) leaves.push_back(parameter);
      }
      {
        const torch::NoGradGuard no_grad;
        for (Tensor& parameter : leaves) parameter.add_(torch::randn_like(parameter), 0.1);
      }
      std::vector<Tensor> hiddens;
      for (int64_t j = 0; j < sources; ++j) {
        hiddens.push_back(torch::randn({tokens, dim}, options).requires_grad_());
      }
      leaves.insert(leaves.end(), hiddens.begin(), hiddens.end());
      const auto run = [&](bool fused) {
        std::vector<Tensor> streams =
            layer->forward(hiddens, {}, fused ? norms : std::vector<Norm>()).first;
        for (int way = 0; !fused && way < 3; ++way)
          streams[way] = norms[way]->forward(streams[way]);
        return streams;
      };
      const auto gradients = [&](bool fused) {
        torch::manual_seed(3);
        Tensor sum = torch::zeros({}, options.dtype(at::kFloat));
        for (const Tensor& stream : run(fused))
          sum = sum + (stream * torch::randn_like(stream)).sum();
        return torch::autograd::grad({sum}, leaves);
      };
      const auto compare = [&](const char* what, const std::vector<Tensor>& fused,
                               const std::vector<Tensor>& composed, double factor) {
        for (size_t i = 0; i < fused.size(); ++i) {
          EXPECT_LE(distance(fused[i], composed[i]),
                    factor * floor_of(dtype) * composed[i].norm().template item<double>() + 1e-6)
              << what << ' ' << i << ", " << dtype << ", " << tokens << " tokens";
        }
      };
      compare("stream", run(true), run(false), 1);
      compare("gradient", gradients(true), gradients(false), 4);
      const torch::NoGradGuard no_grad;
      compare("stream without gradients", run(true), run(false), 1);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Norms, CudaLayers,
    testing::Values(LayerCase{"rms", NormKind::kRMSNorm, false, "none", "qkvr"},
                    LayerCase{"layer", NormKind::kLayerNorm, false, "none", "qkvr"},
                    LayerCase{"rms_pre_post", NormKind::kRMSNorm, true, "residual", "qkvr"},
                    LayerCase{"layer_pre_post", NormKind::kLayerNorm, true, "residual", "qkvr"},
                    LayerCase{"rms_post_all", NormKind::kRMSNorm, false, "all", "qkvr"},
                    LayerCase{"rms_two_ways", NormKind::kRMSNorm, false, "none", "qv"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(CudaAutocast, TrainsAndDecodes) {
  SKIP_WITHOUT_GPU();
  for (const char* name : {"default", "pythia"}) {
    MUDDFormer narrow = scrambled(samples::variant(name), at::kBFloat16),
               exact = copy(narrow, at::kCPU, at::kDouble);
    MUDDFormer model = copy(narrow, at::kCUDA, at::kFloat);
    const Tensor ids = some_ids(2, 40), targets = ids.roll(-1, 1);
    const auto loss_of = [&](MUDDFormer& m, at::Device device) {
      return m->forward(ids.to(device), targets.to(device));
    };
    Tensor loss;
    {
      const Autocast guard(at::kCUDA);
      loss = loss_of(model, at::kCUDA);
    }
    loss.backward();
    loss_of(exact, at::kCPU).backward();
    loss_of(narrow, at::kCPU).backward();
    auto theirs = gradients(narrow), wanted = gradients(exact);
    for (const auto& [name, gradient] : gradients(model)) {
      EXPECT_EQ(gradient.scalar_type(), at::kFloat) << name;
      expect_near(name, gradient, theirs[name], wanted[name], 3);
    }
    const Autocast guard(at::kCUDA);
    EXPECT_EQ(generate(model, ids.cuda(), {.max_new_tokens = 5}).size(1), 45);
  }
}

TEST(CudaAutocast, CastsAHiddenStateOnceInDecoding) {
  SKIP_WITHOUT_GPU();
  DepthAggregation layer(DepthAggregationOptions{.dim = 64, .sources = 3}, at::kCUDA);
  const std::vector<Tensor> hiddens = torch::randn({3, 2, 1, 64}, at::kCUDA).unbind();
  const torch::NoGradGuard no_grad;
  const Autocast guard(at::kCUDA);
  const auto [streams, handed_on] = layer->forward(hiddens);
  const std::vector<Tensor> again = layer->forward(handed_on).second;
  for (size_t j = 0; j < again.size(); ++j) {
    EXPECT_EQ(handed_on[j].scalar_type(), at::kBFloat16);
    EXPECT_TRUE(again[j].is_same(handed_on[j]));
  }
  EXPECT_EQ(streams[0].scalar_type(), at::kBFloat16);
}

// A layer that weighs hidden states otherwise does so in decoding, too.
struct SoftmaxImpl : DepthAggregationImpl {
  using DepthAggregationImpl::DepthAggregationImpl;
  std::tuple<Tensor, Tensor> connection_weights(const Tensor& x, const Tensor& a) override {
    auto [weights, same] = DepthAggregationImpl::connection_weights(x, a);
    return {weights.softmax(-1), same};
  }
};

TEST(CudaSubclass, MakesItsOwnWeights) {
  SKIP_WITHOUT_GPU();
  torch::manual_seed(0);
  const DepthAggregationOptions options{.dim = 64, .sources = 3};
  SoftmaxImpl cpu(options), gpu(options, at::kCUDA);
  const torch::NoGradGuard no_grad;
  auto theirs = gpu.named_parameters();
  for (auto& item : cpu.named_parameters()) {
    item.value().add_(torch::randn_like(item.value()), 0.2);
    theirs[item.key()].copy_(item.value());
  }
  const std::vector<Tensor> hiddens = torch::randn({3, 2, 1, 64}).unbind();
  std::vector<Tensor> there;
  for (const Tensor& x : hiddens) there.push_back(x.cuda());
  const std::vector<Tensor> expected = cpu.forward(hiddens).first, got = gpu.forward(there).first;
  for (size_t c = 0; c < 4; ++c) {
    EXPECT_TRUE(at::allclose(got[c].cpu(), expected[c], 1e-4, 1e-4));
  }
}

TEST(CudaGenerate, SeedDecides) {
  SKIP_WITHOUT_GPU();
  MUDDFormer model = copy(scrambled(samples::small(), at::kFloat), at::kCUDA, at::kFloat);
  const Tensor prompt = some_ids(3, 7).cuda();
  const auto draw = [&](GenerateOptions options) {
    options.max_new_tokens = 12;
    options.temperature = 1;
    return generate(model, prompt, options);
  };
  EXPECT_TRUE(at::equal(draw({.seed = 1}), draw({.seed = 1})));
  EXPECT_FALSE(at::equal(draw({.seed = 1}), draw({.seed = 2})));
  EXPECT_TRUE(
      at::equal(draw({.top_k = 1, .seed = 1}), generate(model, prompt, {.max_new_tokens = 12})));
}

TEST(CudaCheckpoint, SavesFromAndLoadsToTheGpu) {
  SKIP_WITHOUT_GPU();
  const testing_files::Folder folder;
  MUDDFormer model = copy(scrambled(samples::small(), at::kFloat), at::kCUDA, at::kFloat);
  save_pretrained(model, folder.path());
  MUDDFormer loaded = from_pretrained(folder.path(), at::kCUDA),
             other = from_pretrained(folder.path());
  const Tensor ids = some_ids(2, 40);
  EXPECT_TRUE(at::equal(loaded->forward(ids.cuda()), model->forward(ids.cuda())));
  const Tensor before = other->forward(ids);
  other->to(at::kCUDA);  // the tables of positions follow
  EXPECT_TRUE(at::equal(other->forward(ids.cuda()), model->forward(ids.cuda())));
  EXPECT_TRUE(at::allclose(other->forward(ids.cuda()).cpu(), before, 1e-4, 1e-4));
}

TEST(CudaModelsErrors, NameTheArgument) {
  SKIP_WITHOUT_GPU();
  MUDDFormer model(samples::small(), at::kCUDA);
  const std::string message = testing_files::error_of([&] { model->forward(some_ids(1, 4)); });
  EXPECT_NE(message.find("input_ids must be on cuda:0, like the model, got cpu"), std::string::npos)
      << message;
}

}  // namespace
}  // namespace muddformer
