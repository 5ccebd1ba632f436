#include <gtest/gtest.h>
#include <muddformer/nn/depth_aggregation.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "files.h"
#include "reference.h"

namespace muddformer {
namespace {

using at::Tensor;
using testing_files::expect_error;

void scramble(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  for (Tensor& parameter : module.parameters()) parameter.add_(torch::randn_like(parameter), 0.3);
}

TEST(DepthAggregation, EqualsTheNaiveOne) {
  torch::manual_seed(0);
  using Ways = std::variant<std::string, int64_t>;
  for (const Ways& ways : {Ways("qkvr"), Ways("qr"), Ways("v"), Ways(int64_t{3})}) {
    DepthAggregation da(
        DepthAggregationOptions{.dim = 6, .sources = 3, .ways = ways, .connections = {.cap = 2.0}});
    scramble(*da);
    std::vector<Tensor> hiddens;
    for (int j = 0; j < 3; ++j) hiddens.push_back(torch::randn({2, 5, 6}));
    const auto [streams, handed_on] = da->forward(hiddens);
    const std::vector<Tensor> mixed = reference::depth_aggregate(
        hiddens, reference::connection_weights(hiddens[2], da->w1->weight, da->w2->weight,
                                               da->prior, std::nullopt, 1e-6, "none", 2.0));
    const auto* letters = std::get_if<std::string>(&ways);
    ASSERT_EQ(streams.size(), letters != nullptr ? 4 : mixed.size());
    for (size_t c = 0; c < streams.size(); ++c) {
      const size_t place = letters != nullptr ? letters->find("qkvr"[c]) : c;
      const Tensor& expected = place == std::string::npos ? hiddens[2] : mixed[place];
      EXPECT_TRUE(at::allclose(streams[c], expected, 1e-5, 1e-5)) << c;
    }
    for (size_t j = 0; j < 3; ++j) EXPECT_TRUE(at::equal(handed_on[j], hiddens[j]));
  }
}

TEST(DepthAggregation, FreshPassesTheNewestOn) {
  torch::manual_seed(0);
  for (const std::optional<double> cap : {std::optional<double>(), std::optional(1.5)}) {
    for (const char* post_norm : {"none", "all"}) {
      DepthAggregation da(DepthAggregationOptions{
          .dim = 6, .sources = 2, .connections = {.post_norm = post_norm, .cap = cap}});
      const std::vector<Tensor> hiddens = {torch::randn({5, 6}), torch::randn({5, 6})};
      for (const Tensor& stream : da->forward(hiddens).first) {
        EXPECT_TRUE(at::allclose(stream, hiddens[1], 1e-6, 1e-6));
      }
    }
  }
}

TEST(DepthAggregationErrors, NameTheOption) {
  using DA = DepthAggregationOptions;
  expect_error([] { DepthAggregation(DA{.sources = 2}); }, "dim must be from 1");
  expect_error([] { DepthAggregation(DA{.dim = 4, .sources = 2, .ways = int64_t{0}}); },
               "ways must be from 1");
  expect_error([] { DepthAggregation(DA{.dim = 4, .sources = 2, .connections = {.cap = 0}}); },
               "cap must be more than 0 and finite, got 0");
  expect_error([] { DepthAggregation(DA{.dim = 4, .sources = 2})->forward({torch::ones(4)}); },
               "hiddens must be 2 tensors, got 1");
  expect_error(
      [] {
        DepthAggregation(DA{.dim = 4, .sources = 1, .prior = false})->forward({torch::ones(4)});
      },
      "prior must be given");
  const DA one{.dim = 4, .sources = 1};
  for (const bool dynamic : {true, false}) {
    DA options = one;
    options.connections.dynamic = dynamic;
    DepthAggregation da(options);
    expect_error([&] { da->forward({Tensor()}); }, "hiddens[0] must be a tensor, got an undefined");
    expect_error([&] { da->forward({torch::ones(3)}); },
                 "hiddens must have shape [..., dim] with dim = 4, got [3]");
    expect_error([&] { da->forward({torch::ones({})}); }, "with dim = 4, got []");
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{7, 1}, {2, 1}, {4, 2}, {4}}) {
      expect_error([&] { da->forward({torch::ones(4)}, torch::zeros(shape)); },
                   "prior must have shape [4, 1], got [");
      expect_error([&] { da->reset_prior(torch::zeros(shape)); },
                   "prior must have shape [4, 1], got [");
    }
    expect_error([&] { da->reset_prior({}); }, "prior must be a tensor, got an undefined one");
  }
  expect_error([&] { DepthAggregation(one, at::kInt); },
               "tensor_options must have dtype float64, float32, bfloat16 or float16, got Int");
}

struct TwoWaysImpl : DepthAggregationImpl {
  using DepthAggregationImpl::DepthAggregationImpl;
  std::tuple<Tensor, Tensor> connection_weights(const Tensor& x, const Tensor& prior) override {
    auto [weights, newest] = DepthAggregationImpl::connection_weights(x, prior);
    return {undefined ? Tensor() : weights.narrow(-2, 0, 2), newest};
  }
  bool undefined = false;
};

TEST(DepthAggregationErrors, NameWhatASubclassReturns) {
  const auto da = std::make_shared<TwoWaysImpl>(DepthAggregationOptions{.dim = 4, .sources = 1});
  const auto forward = [&] { da->forward({torch::ones({3, 4})}); };
  expect_error(forward, "connection_weights() must return weights [..., C, S] with C = 4, got [3,");
  da->undefined = true;
  expect_error(forward, "connection_weights() must return two tensors, got an undefined one");
}

TEST(NormErrors, NameTheArgument) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double eps : {-1.0, 0.0, 1.5, nan, std::numeric_limits<double>::infinity()}) {
    EXPECT_THROW(Norm(8, eps), c10::ValueError);
    EXPECT_THROW(Norms(std::vector<int64_t>{0}, 8, eps), c10::ValueError);
  }
  EXPECT_THROW(Norm(0, 1e-6), c10::ValueError);
  EXPECT_THROW(Norm(8, 1e-6, NormKind::kRMSNorm, 1.0, at::kLong), c10::TypeError);
  EXPECT_THROW(Linear(0, 4, false, 0.02), c10::ValueError);
  EXPECT_THROW(Linear(4, 4, false, 0.02, at::kComplexFloat), c10::TypeError);
  EXPECT_THROW(Embedding(4, -1, 0.02), c10::ValueError);
  const Tensor x = torch::randn({2, 8});
  const Norm norm(8, 1e-6);
  EXPECT_THROW(normed({x, x}, {norm, norm, norm}), c10::ValueError);
  EXPECT_THROW(normed({}, {norm}), c10::ValueError);
  EXPECT_EQ(normed({x}, {norm, norm, Norm(nullptr)}).size(), 3u);
}

}  // namespace
}  // namespace muddformer
