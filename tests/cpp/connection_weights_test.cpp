#include <gtest/gtest.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include "reference.h"

namespace muddformer {
namespace {

using at::Tensor;

struct Options {
  bool scale;
  double eps;
  const char* gelu;
  std::optional<double> cap;
};

std::ostream& operator<<(std::ostream& out, const Options& o) {
  return out << (o.scale ? "scale, " : "no scale, ") << "eps " << o.eps << ", gelu " << o.gelu
             << ", cap " << o.cap.value_or(0);
}

class ConnectionWeights : public testing::TestWithParam<Options> {};

TEST_P(ConnectionWeights, ForwardAndGradientsEqualTheNaiveOnes) {
  const Options& o = GetParam();
  torch::manual_seed(0);
  const int64_t width = 24, hidden = 16, ways = 4, sources = 5;
  const auto leaf = [](at::IntArrayRef shape) {
    return torch::randn(shape, at::kDouble).requires_grad_();
  };
  std::vector<Tensor> ours = {leaf({2, 3, width}), leaf({hidden, width}),
                              leaf({ways * sources, hidden}), leaf({ways, sources}), leaf({width})};
  std::vector<Tensor> naive;
  for (const Tensor& tensor : ours) naive.push_back(tensor.detach().clone().requires_grad_());
  const auto scale = [&](const std::vector<Tensor>& tensors) {
    return o.scale ? std::optional<Tensor>(tensors[4]) : std::nullopt;
  };

  const auto [weights, x] = connection_weights_chained(ours[0], ours[1], ours[2], ours[3],
                                                       {scale(ours), o.eps, o.gelu, o.cap});
  const Tensor expected = reference::connection_weights(naive[0], naive[1], naive[2], naive[3],
                                                        scale(naive), o.eps, o.gelu, o.cap);
  EXPECT_TRUE(at::allclose(weights, expected, 1e-10, 1e-10));
  (weights.pow(3).sum() + x.square().sum()).backward();
  (expected.pow(3).sum() + naive[0].square().sum()).backward();
  for (size_t i = 0; i < (o.scale ? 5 : 4); ++i) {
    EXPECT_TRUE(at::allclose(ours[i].grad(), naive[i].grad(), 1e-8, 1e-8)) << "argument " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Options, ConnectionWeights,
                         testing::Values(Options{false, 1e-6, "none", std::nullopt},
                                         Options{true, 1e-5, "tanh", std::nullopt},
                                         Options{false, 1e-3, "none", 2.0},
                                         Options{true, 1e-6, "tanh", 10.0}));

TEST(ConnectionWeightsErrors, NameTheArgument) {
  const Tensor x = torch::zeros({2, 8}), w1 = torch::zeros({16, 8}), w2 = torch::zeros({8, 16}),
               prior = torch::zeros({4, 2});
  EXPECT_THROW(connection_weights(x, w2, w2, prior), c10::ValueError);
  EXPECT_THROW(connection_weights(x.to(at::kLong), w1, w2, prior), c10::TypeError);
  EXPECT_THROW(connection_weights(x, w1, w2, prior, {.eps = -1.0}), c10::ValueError);
  EXPECT_THROW(connection_weights(x, w1, w2, prior, {.gelu_approximate = "erf"}), c10::ValueError);
  EXPECT_THROW(connection_weights(x, w1, w2, prior, {.cap = 0.0}), c10::ValueError);
}

}  // namespace
}  // namespace muddformer
