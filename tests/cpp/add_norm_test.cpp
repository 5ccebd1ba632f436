#include <gtest/gtest.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include "autocast.h"

namespace muddformer {
namespace {

using at::Tensor;

class AddNormTest : public testing::TestWithParam<std::string> {};

TEST_P(AddNormTest, ResultsAndGradientsEqualTheNaiveOnes) {
  torch::manual_seed(0);
  const bool layer = GetParam() == "layer";
  const auto leaf = [](at::IntArrayRef shape) {
    return torch::randn(shape, at::kDouble).requires_grad_();
  };
  std::vector<Tensor> ours = {leaf({3, 5, 24}), leaf({3, 5, 24}), leaf({24})};
  if (layer) ours.push_back(leaf({24}));
  std::vector<Tensor> copies;
  for (const Tensor& tensor : ours) copies.push_back(tensor.detach().clone().requires_grad_());

  const Tensor expected_sum = copies[1] + copies[0];
  const Tensor expected = layer ? at::layer_norm(expected_sum, {24}, copies[2], copies[3], 1e-5)
                                : at::rms_norm(expected_sum, {24}, copies[2], 1e-5);
  (expected_sum.sin().sum() + expected.square().sum()).backward();
  const auto [sum, normed] =
      add_norm(ours[0], ours[1], ours[2], layer ? std::optional(ours[3]) : std::nullopt,
               {.norm = GetParam(), .eps = 1e-5});
  EXPECT_TRUE(at::allclose(sum, expected_sum, 1e-12, 1e-12));
  EXPECT_TRUE(at::allclose(normed, expected, 1e-10, 1e-10));
  (sum.sin().sum() + normed.square().sum()).backward();
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_TRUE(at::allclose(ours[i].grad(), copies[i].grad(), 1e-8, 1e-10)) << "argument " << i;
  }
}

INSTANTIATE_TEST_SUITE_P(Norms, AddNormTest, testing::Values("rms", "layer"));

TEST(AddNorm, UnderAutocastTheResidualStreamKeepsItsDtype) {
  const testing_autocast::Autocast autocast(at::kCPU);
  const Tensor x = torch::randn({3, 8}), weight = torch::ones({8});
  const auto [sum, normed] = add_norm(x, x, weight);
  EXPECT_EQ(sum.scalar_type(), at::kFloat);
  EXPECT_EQ(normed.scalar_type(), at::kBFloat16);
}

TEST(AddNorm, ErrorsNameTheArgument) {
  const Tensor x = torch::randn({3, 8}), weight = torch::ones({8});
  EXPECT_THROW(add_norm(x, torch::randn({3, 9}), weight), c10::ValueError);
  EXPECT_THROW(add_norm(x, x.to(at::kBFloat16), weight), c10::TypeError);
  EXPECT_THROW(add_norm(x, x, torch::ones({9})), c10::ValueError);
  EXPECT_THROW(add_norm(x, x, weight, weight), c10::ValueError);
  EXPECT_THROW(add_norm(x, x, weight, std::nullopt, {.norm = "batch"}), c10::ValueError);
  EXPECT_THROW(add_norm(x, x, weight, std::nullopt, {.eps = -1}), c10::ValueError);
  EXPECT_THROW(add_norm(x, x, weight, std::nullopt, {.dtype = at::kHalf}), c10::TypeError);
}

}  // namespace
}  // namespace muddformer
