#include <gtest/gtest.h>
#include <muddformer/inference/generation.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <limits>

#include "files.h"
#include "variants.h"

namespace muddformer {
namespace {

using at::Tensor;
using samples::scrambled;
using samples::small;
using samples::variant;
using testing_files::error_of;

Tensor prompt() {
  torch::manual_seed(1);
  return torch::randint(61, {3, 5}, at::kLong);
}

TEST(Generate, GreedyEqualsFullForwardPasses) {
  for (const char* name : {"default", "plain", "pythia", "denseformer", "pre-post-static",
                           "stride-3x2-norms", "window-1", "gqa", "mqa-tied"}) {
    // In float64: random weights amplify the rounding of products of other shapes.
    MUDDFormer model = scrambled(variant(name), 0.2, at::kDouble);
    Tensor expected = prompt();
    std::vector<Tensor> steps;
    const at::NoGradGuard no_grad;
    for (int step = 0; step < 8; ++step) {
      const Tensor last = model->forward(expected).select(1, -1);
      expected = torch::cat({expected, last.argmax(-1, true)}, 1);
    }
    const Tensor ids = generate(model, prompt(), {.max_new_tokens = 8}, [&](const Tensor& tokens) {
      steps.push_back(tokens);
      return true;
    });
    EXPECT_TRUE(torch::equal(ids, expected)) << name;
    ASSERT_EQ(steps.size(), 8u);
    EXPECT_TRUE(torch::equal(torch::cat(steps, 1), expected.slice(1, 5)));
  }
}

TEST(Generate, CallbackEndsTheGeneration) {
  MUDDFormer model = scrambled(small());
  int calls = 0;
  const Tensor ids = generate(model, prompt(), {.max_new_tokens = 8}, [&](const Tensor& tokens) {
    EXPECT_EQ(tokens.sizes(), (std::vector<int64_t>{3, 1}));
    return ++calls < 3;
  });
  EXPECT_EQ(ids.size(1), 8);
  EXPECT_TRUE(torch::equal(ids, generate(model, prompt(), {.max_new_tokens = 3})));
}

TEST(Generate, DtypeShapeAndNoGradients) {
  MUDDFormer model = scrambled(small());
  const Tensor ids = generate(model, prompt().to(at::kInt), {.max_new_tokens = 19});
  EXPECT_EQ(ids.scalar_type(), at::kInt);
  EXPECT_EQ(ids.sizes(), (std::vector<int64_t>{3, 24}));
  EXPECT_TRUE(torch::equal(ids.slice(1, 0, 5), prompt().to(at::kInt)));
  EXPECT_TRUE(torch::equal(generate(model, prompt(), {}), prompt()));
  EXPECT_TRUE(at::GradMode::is_enabled());
  model->to(at::kBFloat16);
  EXPECT_EQ(generate(model, prompt(), {.max_new_tokens = 2}).size(1), 7);
}

TEST(Generate, SeedDecides) {
  MUDDFormer model = scrambled(small());
  const auto draw = [&](std::optional<int64_t> seed, GenerateOptions options = {}) {
    options.max_new_tokens = 12;
    if (options.temperature == 0) options.temperature = 1;
    options.seed = seed;
    return generate(model, prompt(), options);
  };
  EXPECT_TRUE(torch::equal(draw(1), draw(1)));
  EXPECT_FALSE(torch::equal(draw(1), draw(2)));
  // Drawing with a seed of its own leaves the global generator as it was.
  const Tensor before = at::globalContext().defaultGenerator(at::kCPU).get_state();
  generate(model, torch::zeros({1, 1}, at::kLong),
           {.max_new_tokens = 3, .temperature = 1, .seed = 3});
  EXPECT_TRUE(torch::equal(at::globalContext().defaultGenerator(at::kCPU).get_state(), before));
  EXPECT_TRUE(torch::equal(draw({}), draw({})));  // prompt() seeds the global generator
  const Tensor greedy = generate(model, prompt(), {.max_new_tokens = 12});
  EXPECT_TRUE(torch::equal(draw(1, {.top_k = 1}), greedy));
  EXPECT_TRUE(torch::equal(draw(1, {.top_p = 1e-9}), greedy));
  EXPECT_TRUE(torch::equal(draw(1, {.temperature = 1e-300}), greedy));
}

TEST(Generate, SamplingDistribution) {
  const Tensor logits = torch::tensor({0.1, 0.5, 0.2, 0.15, 0.05}).log().expand({20000, 5});
  const auto generator = at::globalContext().defaultGenerator(at::kCPU).clone();
  const auto check = [&](double temperature, std::optional<int64_t> top_k,
                         std::optional<double> top_p, Tensor expected) {
    const Tensor drawn = sample(logits, temperature, top_k, top_p, generator);
    ASSERT_EQ(drawn.sizes(), (std::vector<int64_t>{20000, 1}));
    const Tensor frequencies = drawn.flatten().bincount({}, 5) / 20000.0;
    EXPECT_LT((frequencies - expected / expected.sum()).abs().max().item<double>(), 0.02);
  };
  check(1, {}, {}, torch::tensor({0.1, 0.5, 0.2, 0.15, 0.05}));
  check(0.5, {}, {}, torch::tensor({0.01, 0.25, 0.04, 0.0225, 0.0025}));
  check(1, 2, {}, torch::tensor({0.0, 0.5, 0.2, 0.0, 0.0}));
  check(1, 9, {}, torch::tensor({0.1, 0.5, 0.2, 0.15, 0.05}));
  check(1, {}, 0.6, torch::tensor({0.0, 0.5, 0.2, 0.0, 0.0}));
  check(1, {}, 0.4, torch::tensor({0.0, 1.0, 0.0, 0.0, 0.0}));
  check(1, 3, 0.8, torch::tensor({0.0, 0.5, 0.2, 0.0, 0.0}));  // top_p counts what top_k leaves
  EXPECT_LE(sample(torch::zeros({500, 50}), 1, 3, {}, generator).max().item<int64_t>(), 2);
}

TEST(Generate, EndOfSequence) {
  MUDDFormer model = scrambled(small());
  const Tensor free = generate(model, prompt(), {.max_new_tokens = 10});
  const auto end = free[0][7].item<int64_t>();
  const Tensor ended = generate(model, prompt(), {.max_new_tokens = 10, .eos_token_id = end});
  for (int64_t row = 0; row < 3; ++row) {
    bool over = false;
    for (int64_t place = 5; place < ended.size(1); ++place) {
      const auto token = ended[row][place].item<int64_t>();
      EXPECT_EQ(token, over ? end : free[row][place].item<int64_t>());
      over = over || token == end;
    }
  }
  const Tensor alone =
      generate(model, prompt().slice(0, 0, 1), {.max_new_tokens = 10, .eos_token_id = end});
  EXPECT_LE(alone.size(1), 8);
  EXPECT_EQ(alone[0][-1].item<int64_t>(), end);
}

TEST(Generate, BadArgumentsAreNamed) {
  MUDDFormer model = scrambled(small());
  const Tensor ids = prompt();
  int calls = 0;
  const auto message = [&](const Tensor& input_ids, GenerateOptions options) {
    const auto count = [&](const Tensor&) { return ++calls, true; };
    return error_of([&] { generate(model, input_ids, options, count); });
  };
  const auto expect = [](const std::string& message, const char* part) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  };
  expect(error_of([&] { generate(MUDDFormer(nullptr), ids, {}); }), "model must be a MUDDFormer");
  expect(message({}, {}), "input_ids must be a tensor");
  expect(message(ids.to(at::kFloat), {}), "input_ids must be int64 or int32, got Float");
  expect(message(ids[0], {}), "input_ids must be [batch, tokens] and not empty, got shape [5]");
  expect(message(ids.slice(1, 0, 0), {}), "got shape [3, 0]");
  expect(message(ids - 61, {}), "input_ids must be from 0 to vocab_size - 1 = 60");
  expect(message(ids + 61, {}), "input_ids must be from 0 to vocab_size - 1 = 60");
  expect(message(ids.to(at::kMeta), {}), "input_ids must be on cpu");
  expect(message(ids, {.max_new_tokens = 20}), "must fit into block_size=24, got 5 + 20");
  expect(message(ids, {.max_new_tokens = std::numeric_limits<int64_t>::max()}), "max_new_tokens");
  expect(message(ids, {.max_new_tokens = -1}), "max_new_tokens must be from 0");
  const auto nan = std::numeric_limits<double>::quiet_NaN();
  for (const double temperature : {-0.5, nan, std::numeric_limits<double>::infinity()}) {
    expect(message(ids, {.max_new_tokens = 1, .temperature = temperature}), "temperature must be");
  }
  for (const double top_p : {0.0, 1.01, nan}) {
    expect(message(ids, {.max_new_tokens = 1, .temperature = 1, .top_p = top_p}), "top_p must be");
  }
  expect(message(ids, {.max_new_tokens = 1, .top_k = 0}), "top_k must be from 1");
  expect(error_of([] { sample({}, 1.0, {}, {}, {}); }), "logits must be a tensor");
  expect(error_of([] { sample(torch::empty({2, 0}), 1.0, {}, {}, {}); }),
         "logits must be [B, vocab_size] with vocab_size >= 1, got shape [2, 0]");
  expect(message(ids, {.max_new_tokens = 1, .seed = -1}), "seed must be from 0");
  expect(message(ids, {.max_new_tokens = 1, .eos_token_id = 61}), "eos_token_id must be from 0");
  expect(message(ids, {.max_new_tokens = 1, .eos_token_id = -1}), "eos_token_id must be from 0");
  EXPECT_EQ(calls, 0);
}

}  // namespace
}  // namespace muddformer
