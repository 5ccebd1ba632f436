#include <gtest/gtest.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include "autocast.h"

namespace muddformer {
namespace {

using at::Tensor;

TEST(Swiglu, ResultAndGradientsEqualTheNaiveOnes) {
  torch::manual_seed(0);
  const Tensor both = torch::randn({3, 5, 48}, at::kDouble).requires_grad_();
  const Tensor copy = both.detach().clone().requires_grad_();
  const auto halves = copy.chunk(2, -1);
  const Tensor expected = at::silu(halves[0]) * halves[1];
  expected.square().sum().backward();
  const Tensor y = swiglu(both);
  EXPECT_TRUE(at::allclose(y, expected, 1e-12, 1e-12));
  y.square().sum().backward();
  EXPECT_TRUE(at::allclose(both.grad(), copy.grad(), 1e-12, 1e-12));

  const Tensor gate = halves[0].detach().requires_grad_(), up = halves[1].detach().requires_grad_();
  swiglu(gate, up).square().sum().backward();
  EXPECT_TRUE(at::allclose(at::cat({gate.grad(), up.grad()}, -1), copy.grad(), 1e-12, 1e-12));
}

TEST(Swiglu, UnderAutocast) {
  const testing_autocast::Autocast autocast(at::kCPU);
  EXPECT_EQ(swiglu(torch::randn({3, 8}), torch::randn({3, 8})).scalar_type(), at::kBFloat16);
}

TEST(Swiglu, ErrorsNameTheArgument) {
  const Tensor gate = torch::randn({3, 7});
  EXPECT_THROW(swiglu(gate), c10::ValueError);
  EXPECT_THROW(swiglu(gate, torch::randn({3, 8})), c10::ValueError);
  EXPECT_THROW(swiglu(gate, gate.to(at::kDouble)), c10::TypeError);
  EXPECT_THROW(swiglu(gate.to(at::kLong), gate), c10::TypeError);
}

}  // namespace
}  // namespace muddformer
