#include <gtest/gtest.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include "autocast.h"

namespace muddformer {
namespace {

using at::Tensor;

TEST(LinearOperator, OutputAndGradientsEqualTheNaiveOnes) {
  torch::manual_seed(0);
  const auto leaf = [](at::IntArrayRef shape) {
    return torch::randn(shape, at::kDouble).requires_grad_();
  };
  const std::vector<Tensor> ours = {leaf({2, 5, 24}), leaf({40, 24}), leaf({40}), leaf({2, 5, 40})};
  for (const bool bias : {false, true}) {
    for (const bool residual : {false, true}) {
      std::vector<Tensor> copies;
      for (const Tensor& tensor : ours) copies.push_back(tensor.detach().clone().requires_grad_());
      const auto given = [](bool there, const Tensor& tensor) {
        return there ? std::optional<Tensor>(tensor) : std::nullopt;
      };
      const Tensor y =
          muddformer::linear(ours[0], ours[1], given(bias, ours[2]), given(residual, ours[3]));
      Tensor expected = at::linear(copies[0], copies[1], given(bias, copies[2]));
      if (residual) expected = expected + copies[3];
      EXPECT_TRUE(at::equal(y, expected));
      for (const Tensor& tensor : ours) tensor.mutable_grad().reset();
      y.pow(3).sum().backward();
      expected.pow(3).sum().backward();
      for (size_t i = 0; i < ours.size(); ++i) {
        ASSERT_EQ(ours[i].grad().defined(), copies[i].grad().defined()) << "argument " << i;
        if (!ours[i].grad().defined()) continue;
        EXPECT_TRUE(at::allclose(ours[i].grad(), copies[i].grad(), 1e-10, 1e-10))
            << "argument " << i;
      }
    }
  }
}

TEST(LinearOperator, UnderAutocastParametersKeepTheirDtype) {
  const Tensor x = torch::randn({6, 16}).requires_grad_();
  const Tensor weight = torch::randn({40, 16}).requires_grad_();
  const Tensor residual = torch::randn({6, 40}).requires_grad_();
  Tensor y;
  {
    const testing_autocast::Autocast autocast(at::kCPU);
    EXPECT_EQ(muddformer::linear(x, weight).scalar_type(), at::kBFloat16);
    y = muddformer::linear(x, weight, std::nullopt, residual);
  }
  EXPECT_EQ(y.scalar_type(), at::kFloat);
  y.sum().backward();
  EXPECT_EQ(weight.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(x.grad().scalar_type(), at::kFloat);
}

TEST(LinearOperatorErrors, NameTheArgument) {
  const Tensor x = torch::zeros({2, 8}), w = torch::zeros({16, 8});
  EXPECT_THROW(muddformer::linear(x, w.t()), c10::ValueError);
  EXPECT_THROW(muddformer::linear(x.to(at::kLong), w), c10::TypeError);
  EXPECT_THROW(muddformer::linear(x, w, torch::zeros({8})), c10::ValueError);
  EXPECT_THROW(muddformer::linear(x, w, std::nullopt, x), c10::ValueError);
}

}  // namespace
}  // namespace muddformer
