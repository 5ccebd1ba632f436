// The aggregation with normed streams and the decoding step, as C++ calls them.
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <vector>

#include "muddformer/muddformer.h"

namespace muddformer {
namespace {

using at::Tensor;

struct Inputs {
  std::vector<Tensor> hiddens;
  Tensor weights;
};

Inputs inputs(int64_t ways) {
  torch::manual_seed(0);
  Inputs made;
  for (int j = 0; j < 3; ++j) made.hiddens.push_back(torch::randn({2, 4, 8}, at::kDouble));
  made.weights = torch::randn({2, 4, ways, 3}, at::kDouble);
  return made;
}

void expect_close(const std::vector<Tensor>& streams, const std::vector<Tensor>& expected) {
  ASSERT_EQ(streams.size(), expected.size());
  for (size_t c = 0; c < streams.size(); ++c) {
    EXPECT_TRUE(at::allclose(streams[c], expected[c], 1e-10, 1e-10)) << "stream " << c;
  }
}

TEST(DepthAggregateNorm, NormsTheWaysThatHaveAWeight) {
  const auto [hiddens, weights] = inputs(2);
  const Tensor weight = torch::rand({8}, at::kDouble), bias = torch::rand({8}, at::kDouble);
  std::vector<Tensor> expected = depth_aggregate(hiddens, weights);
  expected[0] = at::layer_norm(expected[0], {8}, weight, bias, 1e-5);
  StreamNorms norms{"layer", 1e-5};
  norms.weights = OptionalTensors({weight, std::nullopt});
  norms.biases = OptionalTensors({bias, std::nullopt});
  expect_close(std::get<0>(depth_aggregate_norm_chained(hiddens, weights, norms)), expected);
}

TEST(DepthAggregateNorm, EmptyListsAreNoNorms) {
  const auto [hiddens, weights] = inputs(2);
  StreamNorms norms;
  norms.add_newest = true;
  std::vector<Tensor> expected = depth_aggregate(hiddens, weights);
  for (Tensor& stream : expected) stream = stream + hiddens.back();
  expect_close(std::get<0>(depth_aggregate_norm_chained(hiddens, weights, norms)), expected);
  EXPECT_TRUE(norms.weights.empty());

  norms.weights = OptionalTensors({torch::ones({8}, at::kDouble), std::nullopt});
  EXPECT_THROW(depth_aggregate_norm_chained(hiddens, weights, norms), c10::ValueError);  // no kind
}

TEST(DepthAggregationStep, TakesNormsWithoutABase) {
  const auto [hiddens, weights] = inputs(2);
  const Tensor prior = torch::rand({2, 3}, at::kDouble);
  const std::vector<Tensor> sums = depth_aggregate(hiddens, prior.expand({2, 4, 2, 3}));
  expect_close(depth_aggregation_step(hiddens, std::nullopt, std::nullopt, prior), sums);
  StreamNorms norms;
  norms.pre_weight = torch::ones({8}, at::kDouble);
  EXPECT_THROW(depth_aggregation_step(hiddens, std::nullopt, std::nullopt, prior, {}, norms),
               c10::ValueError);
}

TEST(Predicates, NoKernelOnTheCPU) {
  EXPECT_FALSE(fuses_norms(torch::zeros({2, 64}), 5, 4));
  EXPECT_FALSE(fuses_step(torch::zeros({1, 64})));
  EXPECT_THROW(fuses_norms(Tensor(), 5, 4), c10::TypeError);
}

}  // namespace
}  // namespace muddformer
