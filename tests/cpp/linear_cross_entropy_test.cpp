#include <gtest/gtest.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include "autocast.h"

namespace muddformer {
namespace {

using at::Tensor;

// cross_entropy(hidden weight^T + bias) + z logsumexp^2, mean over the tokens that count.
Tensor naive(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Tensor& bias,
             const TokenLossOptions& o) {
  const Tensor logits = at::linear(hidden, weight, bias).flatten(0, -2);
  const Tensor flat = targets.flatten().to(at::kLong), counts = flat.ne(o.ignore_index);
  const Tensor losses = at::cross_entropy_loss(logits, flat, {}, at::Reduction::None,
                                               o.ignore_index, o.label_smoothing);
  const Tensor lse = logits.logsumexp(-1);
  return (losses + o.z_loss * lse.square() * counts).sum() / counts.sum();
}

class LinearCrossEntropy : public testing::TestWithParam<TokenLossOptions> {};

TEST_P(LinearCrossEntropy, LossAndGradientsEqualTheNaiveOnes) {
  const TokenLossOptions& o = GetParam();
  torch::manual_seed(0);
  const auto leaf = [](at::IntArrayRef shape) {
    return torch::randn(shape, at::kDouble).requires_grad_();
  };
  const std::vector<Tensor> ours = {leaf({3, 5, 24}), leaf({61, 24}), leaf({61})};
  std::vector<Tensor> copies;
  for (const Tensor& tensor : ours) copies.push_back(tensor.detach().clone().requires_grad_());
  Tensor targets = torch::randint(61, {3, 5}, at::kInt);
  targets[1] = o.ignore_index;

  const Tensor loss = linear_cross_entropy(ours[0], ours[1], targets, ours[2], "mean", o);
  const Tensor expected = naive(copies[0], copies[1], targets, copies[2], o);
  EXPECT_TRUE(at::allclose(loss, expected, 1e-10, 1e-10));
  (3 * loss).backward();
  (3 * expected).backward();
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_TRUE(at::allclose(ours[i].grad(), copies[i].grad(), 1e-8, 1e-10)) << "argument " << i;
  }
  const Tensor losses = linear_cross_entropy(ours[0], ours[1], targets, ours[2], "none", o);
  EXPECT_EQ(losses.sizes(), targets.sizes());
  EXPECT_TRUE(at::allclose(losses.sum() / 10, expected, 1e-10, 1e-10));
  EXPECT_TRUE(at::allclose(linear_cross_entropy(ours[0], ours[1], targets, ours[2], "sum", o) / 10,
                           expected, 1e-10, 1e-10));
}

INSTANTIATE_TEST_SUITE_P(Options, LinearCrossEntropy,
                         testing::Values(TokenLossOptions{}, TokenLossOptions{-1, 0, 0, 4},
                                         TokenLossOptions{-100, 0.1, 0, 7},
                                         TokenLossOptions{7, 0.2, 1e-2, 1}));

TEST(LinearCrossEntropyAutocast, GradientOfTheHeadIsNeverRounded) {
  torch::manual_seed(0);
  const Tensor hidden = torch::randn({6, 16}).requires_grad_();
  const Tensor weight = torch::randn({40, 16}).requires_grad_();
  {
    const testing_autocast::Autocast autocast(at::kCPU);
    linear_cross_entropy(hidden, weight, torch::randint(40, {6}, at::kLong)).backward();
  }
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  EXPECT_FALSE(at::equal(weight.grad(), weight.grad().to(at::kBFloat16).to(at::kFloat)));
}

TEST(LinearCrossEntropy, NothingCountsWhereAllTargetsAreIgnored) {
  const Tensor hidden = torch::randn({6, 16}).requires_grad_();
  const Tensor weight = torch::randn({40, 16}).requires_grad_();
  const Tensor loss = linear_cross_entropy(hidden, weight, torch::full({6}, -100, at::kLong));
  loss.backward();
  EXPECT_EQ(loss.item<float>(), 0);
  EXPECT_FALSE(hidden.grad().any().item<bool>());
  EXPECT_FALSE(weight.grad().any().item<bool>());
}

TEST(LinearCrossEntropyErrors, NameTheArgument) {
  const Tensor x = torch::zeros({2, 8}), w = torch::zeros({16, 8}),
               y = torch::zeros({2}, at::kLong);
  EXPECT_THROW(linear_cross_entropy(x, x.t(), y), c10::ValueError);
  EXPECT_THROW(linear_cross_entropy(x, w, x), c10::TypeError);
  EXPECT_THROW(linear_cross_entropy(x, w, y.view({2, 1})), c10::ValueError);
  EXPECT_THROW(linear_cross_entropy(x, w, y, std::nullopt, "all"), c10::ValueError);
  EXPECT_THROW(linear_cross_entropy(x, w, y, std::nullopt, "mean", {.label_smoothing = 2}),
               c10::ValueError);
  EXPECT_THROW(linear_cross_entropy(x, w, y, std::nullopt, "mean", {.z_loss = -1}),
               c10::ValueError);
  EXPECT_THROW(linear_cross_entropy(x, w, y, std::nullopt, "mean", {.chunk = 0}), c10::ValueError);
  EXPECT_THROW(linear_cross_entropy(x, w, y + 16), c10::IndexError);
}

}  // namespace
}  // namespace muddformer
