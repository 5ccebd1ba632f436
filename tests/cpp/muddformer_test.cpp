#include <gtest/gtest.h>
#include <muddformer/models.h>
#include <torch/torch.h>

#include <algorithm>
#include <sstream>
#include <string>

#include "autocast.h"
#include "variants.h"

namespace muddformer {
namespace {

using at::Tensor;
using samples::scrambled;
using samples::small;
using samples::Variant;
using samples::variants;

Tensor some_ids(int64_t batch = 2, int64_t length = 9) {
  torch::manual_seed(1);
  return torch::randint(small().vocab_size, {batch, length}, at::kLong);
}

std::string name_of(const testing::TestParamInfo<Variant>& info) {
  std::string name = info.param.name;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

class Models : public testing::TestWithParam<Variant> {};

TEST_P(Models, FreshEqualsPlainTwin) {
  torch::manual_seed(0);
  MUDDFormer model(GetParam().config);
  MUDDFormer twin = model->plain_twin();
  for (const auto& item : twin->named_parameters()) {
    EXPECT_EQ(item.key().find("dense"), std::string::npos) << item.key();
  }
  const Tensor ids = some_ids();
  if (model->config.cap) {
    EXPECT_TRUE(at::allclose(model->forward(ids), twin->forward(ids), 1e-5, 1e-5));
  } else if (!model->config.pre_norm || model->config.post_norm != "none") {
    EXPECT_TRUE(at::equal(model->forward(ids), twin->forward(ids)));
  }
}

TEST_P(Models, EveryParameterHasAGradient) {
  MUDDFormer model = scrambled(GetParam().config);
  model->forward(some_ids(), some_ids()).backward();
  for (const auto& item : model->named_parameters()) {
    ASSERT_TRUE(item.value().grad().defined()) << item.key();
    EXPECT_TRUE(item.value().grad().isfinite().all().item<bool>()) << item.key();
  }
}

// In float64: these random weights magnify the rounding of products of other sizes.
TEST_P(Models, CachedDecodeEqualsFullForward) {
  if (!GetParam().config.causal) GTEST_SKIP() << "has no cache";
  MUDDFormer model = scrambled(GetParam().config);
  model->to(at::kDouble);
  const torch::NoGradGuard no_grad;
  const Tensor ids = some_ids(), full = model->forward(ids);
  KVCache cache(model->config, ids.size(0), 12, at::kDouble);
  std::vector<Tensor> parts = {model->forward(ids.slice(1, 0, 4), {}, &cache)};
  parts.push_back(model->forward(ids.slice(1, 4, 7), {}, &cache));  // several tokens at once
  parts.push_back(model->forward(ids.slice(1, 7, 8), {}, &cache));
  parts.push_back(model->forward(ids.slice(1, 8, 9).to(at::kInt), {}, &cache));
  EXPECT_EQ(cache.used(), 9);
  EXPECT_EQ(cache.length(), 12);
  EXPECT_TRUE(at::allclose(at::cat(parts, 1), full, 1e-8, 1e-8));
}

TEST_P(Models, CloneIsDeep) {
  MUDDFormer model = scrambled(GetParam().config);
  model->eval();
  const Tensor ids = some_ids(), expected = model->forward(ids);
  const Tensor state = at::detail::getDefaultCPUGenerator().get_state();
  const MUDDFormer clone(std::dynamic_pointer_cast<MUDDFormerImpl>(model->clone()));
  EXPECT_TRUE(at::equal(at::detail::getDefaultCPUGenerator().get_state(), state));
  ASSERT_TRUE(clone);
  EXPECT_FALSE(clone.ptr()->is_training());
  EXPECT_TRUE(at::equal(clone.ptr()->forward(ids), expected));
  const auto theirs = clone->named_parameters();
  for (const auto& item : model->named_parameters()) {
    EXPECT_FALSE(theirs[item.key()].is_alias_of(item.value())) << item.key();
  }
  const torch::NoGradGuard no_grad;
  for (Tensor& parameter : clone->parameters()) parameter.zero_();
  EXPECT_TRUE(at::equal(model->forward(ids), expected));
  EXPECT_FALSE(clone.ptr()->forward(ids).any().item<bool>());
}

TEST_P(Models, SaveAndLoad) {
  MUDDFormer model = scrambled(GetParam().config), other(GetParam().config);
  std::stringstream stream;
  torch::save(model, stream);
  torch::load(other, stream);
  EXPECT_TRUE(at::equal(other->forward(some_ids()), model->forward(some_ids())));
}

INSTANTIATE_TEST_SUITE_P(Variants, Models, testing::ValuesIn(variants()), name_of);

TEST(MUDDFormer, Prints) {
  MUDDFormerConfig c = small();
  c.n_layer = 2;
  c.cap = 3;
  std::ostringstream out;
  out << MUDDFormer(c);
  const std::string text = out.str();
  for (const char* expected :
       {"muddformer::MUDDFormer(\n  (layers): torch::nn::ModuleList(\n    (0): muddformer::Block(\n"
        "      (attention): muddformer::Attention(\n        (wq): "
        "muddformer::Linear(in_features=32, out_features=32, bias=false)\n",
        "(q_norm): muddformer::RMSNorm(8, eps=1e-06)", "(dense_bs): muddformer::Priors([4, 2], ",
        "(0): muddformer::DepthAggregation(32, sources=2, ways=qkvr, dynamic=true, eps=1e-06, "
        "gelu_approximate=none, cap=3",
        "(w1): muddformer::Linear(in_features=32, out_features=64, bias=false)",
        "(tok_embeddings): muddformer::Embedding(61, 32)",
        "(rotary): muddformer::RotaryEmbedding(positions=24, rotary_dim=8, base=10000)",
        "(output): muddformer::Linear(in_features=32, out_features=61, bias=false)"}) {
    EXPECT_NE(text.find(expected), std::string::npos) << expected << "\nis not in\n" << text;
  }
}

TEST(MUDDFormer, HasTheNamesOfTheRelease) {
  MUDDFormerConfig c = small();
  c.n_layer = 2;
  const auto parameters = MUDDFormer(c)->named_parameters();
  for (const char* name :
       {"tok_embeddings.weight", "layers.0.attention.wq.weight", "layers.1.attention.wo.weight",
        "layers.0.attention.q_norm.weight", "layers.0.attention_norm.weight",
        "layers.1.attention_norms.2.weight", "layers.1.ffn_norm.weight",
        "layers.1.feed_forward.w3.weight", "norm.weight", "output.weight", "dense_bs.0",
        "dense_bs.1", "dynamic_dense.0.w1.weight", "dynamic_dense.1.w2.weight"}) {
    EXPECT_TRUE(parameters.contains(name)) << name;
  }
  EXPECT_EQ(parameters.size(), 1 + 2 * 11 + 2 + 2 + 6u);
  EXPECT_EQ(parameters["dense_bs.0"].sizes(), (std::vector<int64_t>{4, 2}));
  EXPECT_EQ(parameters["dynamic_dense.1.w1.weight"].sizes(), (std::vector<int64_t>{64, 32}));
}

TEST(MUDDFormer, InitialValues) {
  torch::manual_seed(1);
  MUDDFormerConfig c = small();
  c.n_layer = 3;
  c.dim = 256;
  const MUDDFormer model(c);
  const auto p = model->named_parameters();
  EXPECT_TRUE(at::equal(p["dense_bs.1"], torch::tensor({0., 0., 1.}, at::kFloat).expand({4, 3})));
  EXPECT_NEAR(p["dynamic_dense.1.w1.weight"].std().item<double>(), 1 / 16., 0.05 / 16);
  EXPECT_FALSE(p["dynamic_dense.1.w2.weight"].any().item<bool>());
  EXPECT_NEAR(p["layers.0.attention.wq.weight"].std().item<double>(), 0.02, 0.001);
  EXPECT_EQ(model->connection_parameters().size(), 9u);
}

TEST(MUDDFormer, MovesBetweenTypes) {
  MUDDFormer model = scrambled(small());
  const Tensor ids = some_ids(), expected = model->forward(ids);
  model->to(at::kDouble);
  EXPECT_TRUE(at::allclose(model->forward(ids), expected.to(at::kDouble), 1e-4, 1e-4));
  EXPECT_EQ(model->forward(ids, ids).scalar_type(), at::kDouble);
  MUDDFormer narrow(small(), at::kBFloat16);
  EXPECT_EQ(narrow->forward(ids).scalar_type(), at::kBFloat16);
  EXPECT_EQ(narrow->forward(ids, ids).scalar_type(), at::kFloat);
  MUDDFormer meta(small(), at::kMeta);
  EXPECT_TRUE(meta->parameters()[0].is_meta());
}

TEST(MUDDFormer, Trains) {
  torch::manual_seed(0);
  MUDDFormer model(small());
  torch::optim::AdamW optimizer(model->parameters(), 2e-2);
  const Tensor ids = some_ids(4, 16), targets = ids.roll(-1, 1);
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    const Tensor loss = model->forward(ids, targets);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  EXPECT_LT(last, 0.5 * first);
}

TEST(MUDDFormer, TrainsAfterInferenceMode) {
  MUDDFormer model(small());
  {
    const c10::InferenceMode guard;
    model->forward(some_ids());
  }
  EXPECT_NO_THROW(model->forward(some_ids(), some_ids()).backward());
}

TEST(MUDDFormer, WorksInsideSequentialAndIgnoresTargets) {
  MUDDFormer model = scrambled(small());
  torch::nn::Sequential sequential(model);
  const Tensor ids = some_ids();
  EXPECT_TRUE(at::equal(sequential->forward(ids), model->forward(ids)));
  Tensor targets = ids.clone();
  targets.slice(1, 3).fill_(-100);
  const Tensor expected = model->forward(ids.slice(1, 0, 3), ids.slice(1, 0, 3));
  EXPECT_TRUE(at::allclose(model->forward(ids, targets), expected));
}

template <class Error, class Call>
void expect_error(const Call& call, const std::string& text) {
  try {
    call();
    ADD_FAILURE() << "no error: " << text;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what_without_backtrace()).find(text), std::string::npos)
        << error.what_without_backtrace();
  }
}

TEST(MUDDFormerErrors, NameTheArgument) {
  MUDDFormer model(small());
  const Tensor ids = torch::zeros({2, 5}, at::kLong);
  const auto given = [&](const Tensor& input, const Tensor& targets = {}) {
    return [=] { model.ptr()->forward(input, targets); };
  };
  expect_error<c10::TypeError>(given({}), "input_ids must be a tensor");
  expect_error<c10::TypeError>(given(ids.to(at::kFloat)), "input_ids must be int64 or int32");
  expect_error<c10::ValueError>(given(ids[0]), "input_ids must be [batch, tokens], got shape [5]");
  expect_error<c10::ValueError>(given(ids.repeat({1, 5})),
                                "input_ids must have at most block_size=24 tokens, got 25");
  expect_error<c10::IndexError>(given(ids + 61),
                                "input_ids must be from 0 to vocab_size - 1 = 60, got 61 to 61");
  expect_error<c10::IndexError>(given(ids - 1), "got -1 to -1");
  expect_error<c10::ValueError>(given(ids.to(at::kMeta)), "input_ids must be on cpu");
  expect_error<c10::ValueError>(given(ids, ids.slice(1, 0, 4)),
                                "targets must have the shape of input_ids [2, 5], got [2, 4]");
  expect_error<c10::TypeError>(given(ids, ids.to(at::kFloat)), "targets must be int64 or int32");
  expect_error<c10::TypeError>([] { MUDDFormer(small(), at::kInt); }, "options must have dtype");
  MUDDFormerConfig wrong = small();
  wrong.n_head = 5;
  expect_error<c10::ValueError>([&] { MUDDFormer{wrong}; }, "dim must be a multiple of n_head");
  MUDDFormer other = scrambled(small());
  expect_error<c10::ValueError>([&] { other->plain_twin(); },
                                "layers.1.attention_norms differ, so this model has no plain twin");
}

// A block that pulls its streams from a history does what it does with streams that are ready.
TEST(Block, TakesAHistoryOrStreams) {
  for (const char* name : {"default", "plain", "pythia", "one-way", "shared-norms"}) {
    MUDDFormer model = scrambled(samples::variant(name));
    const Rotary rotary = model->rotary->forward(6, at::kCPU);
    const Tensor x = torch::randn({2, 6, 32});
    History pulled = model->connections.begin(x), ready = model->connections.begin(x);
    for (size_t i = 0; i < 2; ++i) {
      const auto block = model->layers->ptr<BlockImpl>(i);
      const Tensor y = block->forward(pulled, rotary);
      const std::vector<Tensor> streams = ready.streams();
      EXPECT_TRUE(at::equal(y, block->forward(streams, rotary))) << name;
      pulled.append(y);
      ready.append(y);
    }
  }
  const auto block = MUDDFormer(small())->layers->ptr<BlockImpl>(0);
  const Tensor x = torch::randn({2, 6, 32});
  expect_error<c10::ValueError>([&] { block->forward({x, x}, {}); },
                                "streams must be one tensor or four (xq, xk, xv, xr), got 2");
}

TEST(MUDDFormer, CausalOrNot) {
  MUDDFormerConfig c = small();
  const Tensor ids = some_ids();
  Tensor changed = ids.clone();
  changed.slice(1, 8).fill_(0);
  const auto first = [](MUDDFormer& model, const Tensor& ids) {
    return model->forward(ids).slice(1, 0, 8);
  };
  MUDDFormer causal = scrambled(c);
  EXPECT_TRUE(at::equal(first(causal, ids), first(causal, changed)));
  c.causal = false;
  MUDDFormer model = scrambled(c);
  EXPECT_FALSE(at::allclose(first(model, ids), first(model, changed)));
  expect_error<c10::ValueError>([&] { KVCache(model->config, 2, 8); },
                                "causal must be true for a KVCache and for generation");
  expect_error<c10::ValueError>([&] { generate(model, ids, {.max_new_tokens = 1}); },
                                "causal must be true for a KVCache and for generation");
}

TEST(MUDDFormer, PartsBesideTheFamily) {
  MUDDFormerConfig c = samples::variant("pythia");
  c.norm = "rms";
  c.feed_forward = "swiglu";
  MUDDFormer model = scrambled(c);
  const auto p = model->named_parameters();
  EXPECT_TRUE(p.contains("layers.0.feed_forward.w3.bias"));
  EXPECT_FALSE(p.contains("norm.bias"));
  EXPECT_NO_THROW(model->forward(some_ids(), some_ids()).backward());
}

TEST(KVCacheErrors, NameTheArgument) {
  MUDDFormer model(small());
  const Tensor ids = some_ids();
  expect_error<c10::ValueError>([&] { KVCache(model->config, 0, 8); }, "batch_size must be from 1");
  expect_error<c10::ValueError>([&] { KVCache(model->config, 2, 25); },
                                "length must be from 1 to 24, got 25");
  KVCache cache(model->config, 2, 8);
  expect_error<c10::Error>([&] { model->forward(ids, {}, &cache); }, "only without gradients");
  const torch::NoGradGuard no_grad;
  expect_error<c10::ValueError>([&] { model->forward(ids, {}, &cache); },
                                "input_ids has 9 tokens, but of the 8 places of the cache 0 are");
  expect_error<c10::IndexError>([&] { model->forward(ids.slice(1, 0, 5) + 61, {}, &cache); },
                                "input_ids must be from 0");
  expect_error<c10::ValueError>([&] { model->forward(ids.slice(0, 0, 1), {}, &cache); },
                                "input_ids must be 2 sequences, as many as the cache has, got 1");
  EXPECT_EQ(cache.used(), 0);
  model->forward(ids.slice(1, 0, 5), {}, &cache);
  expect_error<c10::ValueError>([&] { model->forward(ids.slice(1, 0, 4), {}, &cache); },
                                "input_ids has 4 tokens, but of the 8 places of the cache 5 are");
  EXPECT_EQ(cache.used(), 5);
  expect_error<c10::ValueError>([&] { cache.reserve(-3); }, "count must be from 0");
  const Tensor k = torch::zeros({2, 4, 5, 8});
  expect_error<c10::ValueError>([&] { cache.update(-1, k, k); }, "layer must be from 0 to 4");
  expect_error<c10::ValueError>([&] { cache.update(0, k.slice(2, 1), k); }, "k must have shape [");
  expect_error<c10::TypeError>([&] { cache.update(0, k, {}); }, "v must be a tensor");
  const Tensor classes = torch::full({2, 3}, 99, torch::kLong);
  expect_error<c10::IndexError>([&] { model->forward(ids.slice(1, 5, 8), classes, &cache); },
                                "targets: expected classes from 0 to");
  EXPECT_EQ(cache.used(), 5);
  const Tensor after = model->forward(ids.slice(1, 5, 8), {}, &cache);
  EXPECT_TRUE(torch::allclose(after, model->forward(ids.slice(1, 0, 8)).slice(1, 5), 1e-4, 1e-5));
  EXPECT_EQ(cache.used(), 8);
  KVCache unused(model->config, 2, 8);
  expect_error<c10::Error>([&] { unused.update(0, k, k); }, "update() came before reserve()");
  EXPECT_EQ(model->forward(ids.slice(1, 0, 0), {}, &unused).size(1), 0);
}

TEST(KVCacheErrors, OfACacheOfAnotherModel) {
  MUDDFormer model(small());
  const Tensor ids = some_ids();
  const torch::NoGradGuard no_grad;
  const auto with = [](const auto& change) {
    MUDDFormerConfig c = small();
    change(c);
    return c;
  };
  const auto refused = [&](KVCache cache, const std::string& text) {
    expect_error<c10::Error>([&] { model->forward(ids, {}, &cache); }, text);
    EXPECT_EQ(cache.used(), 0);
  };
  refused(KVCache(with([](auto& c) { c.n_layer = 1; }), 2, 12),
          "cache must be one of this model with n_layer=5, got 1");
  refused(KVCache(with([](auto& c) { c.n_kv_heads = 1; }), 2, 12),
          "cache must be one of this model with n_kv_heads=4, got 1");
  refused(KVCache(with([](auto& c) { c.dim = 64; }), 2, 12),
          "cache must be one of this model with head_dim=8, got 16");
  refused(KVCache(with([](auto& c) { c.block_size = 48; }), 2, 48),
          "cache must hold at most block_size=24 tokens, got 48");
  refused(KVCache(model->config, 2, 12, at::kBFloat16), "cache must be Float, like the model");
  refused(KVCache(model->config, 2, 12, at::kMeta), "cache must be on cpu, like the model");
  expect_error<c10::TypeError>([&] { KVCache(model->config, 2, 12, at::kInt); },
                               "options must have dtype");
  // Autocast gives keys and values its own dtype.
  KVCache other(model->config, 2, 12, at::kBFloat16);
  const testing_autocast::Autocast autocast(at::kCPU);
  model->forward(ids, {}, &other);
  EXPECT_EQ(other.used(), 9);
}

// Made in inference mode, used without it.
TEST(KVCache, OfInferenceMode) {
  MUDDFormer model(small());
  auto cache = [&] {
    const c10::InferenceMode inference;
    return KVCache(model->config, 2, 12);
  }();
  const torch::NoGradGuard no_grad;
  const Tensor ids = some_ids();
  const Tensor expected = model->forward(ids);
  EXPECT_TRUE(at::allclose(model->forward(ids, {}, &cache), expected, 1e-5, 1e-5));
}

TEST(LayerErrors, NameTheArgument) {
  MUDDFormer model(small());
  expect_error<c10::ValueError>([&] { model->rotary->forward(25, at::kCPU); },
                                "length must be from 0 to 24, got 25");
  expect_error<c10::TypeError>([&] { model->rotary->forward_at(torch::ones(2)); },
                               "positions must be int64, got Float");
  const Rotary one = model->rotary->forward(1, at::kCPU), none;
  const Tensor x = torch::randn({2, 6, 4, 8});
  expect_error<c10::ValueError>([&] { apply_rotary(x, one); },
                                "rotary must be [T, half] with T = 6 and half at most 4, got [1,");
  expect_error<c10::TypeError>([&] { apply_rotary(x, none); }, "rotary must have two tensors");
  expect_error<c10::ValueError>([&] { apply_rotary(x[0], one); }, "x must be [B, T, H, E]");
  expect_error<c10::ValueError>([] { FeedForward(small(), 0); }, "width must be from 1");
  expect_error<c10::ValueError>([] { norm_kind(MUDDFormerConfig{}); }, "norm has no value");
  expect_error<c10::ValueError>([] { norm_kind(MUDDFormerConfig{.norm = "batch"}); },
                                "norm must be one of 'rms', 'layer', got 'batch'");
}

}  // namespace
}  // namespace muddformer
