#include <gtest/gtest.h>
#include <muddformer/models.h>
#include <muddformer/ops.h>
#include <torch/torch.h>

#include "autocast.h"

namespace muddformer {
namespace {

using at::Tensor;

TEST(QkNormRotary, ResultsAndGradientsEqualTheStepsOfAttention) {
  torch::manual_seed(0);
  const auto leaf = [](at::IntArrayRef shape) {
    return torch::randn(shape, at::kDouble).requires_grad_();
  };
  const std::vector<Tensor> ours = {leaf({2, 5, 4, 16}), leaf({2, 5, 2, 16}), leaf({16}),
                                    leaf({16})};
  std::vector<Tensor> copies;
  for (const Tensor& tensor : ours) copies.push_back(tensor.detach().clone().requires_grad_());
  const Tensor angles = 7 * torch::rand({5, 6});
  const Rotary rotary{angles.cos(), angles.sin()};

  const auto expected = [&](int64_t i) {
    return apply_rotary(at::rms_norm(copies[i], {16}, copies[i + 2], 1e-5), rotary);
  };
  const Tensor expected_q = expected(0), expected_k = expected(1);
  (expected_q.sin().sum() + expected_k.square().sum()).backward();
  const auto [q, k] =
      qk_norm_rotary(ours[0], ours[1], rotary.cos, rotary.sin, ours[2], ours[3], 1e-5);
  EXPECT_TRUE(at::allclose(q, expected_q, 1e-10, 1e-10));
  EXPECT_TRUE(at::allclose(k, expected_k, 1e-10, 1e-10));
  (q.sin().sum() + k.square().sum()).backward();
  for (size_t i = 0; i < ours.size(); ++i) {
    EXPECT_TRUE(at::allclose(ours[i].grad(), copies[i].grad(), 1e-8, 1e-10)) << "argument " << i;
  }
}

TEST(QkNormRotary, WithoutNorms) {
  const Tensor q = torch::randn({2, 5, 4, 16}), angles = 7 * torch::rand({5, 8});
  const auto [y, unused] = qk_norm_rotary(q, q, angles.cos(), angles.sin());
  const Tensor expected = apply_rotary(q, {angles.cos(), angles.sin()});
  EXPECT_TRUE(at::equal(y, expected));
}

TEST(QkNormRotary, UnderAutocast) {
  const testing_autocast::Autocast autocast(at::kCPU);
  const Tensor q = torch::randn({2, 5, 4, 16}), angles = torch::rand({5, 8});
  const auto [y, unused] =
      qk_norm_rotary(q, q, angles, angles, torch::ones({16}), torch::ones({16}));
  EXPECT_EQ(y.scalar_type(), at::kBFloat16);
}

TEST(QkNormRotary, ErrorsNameTheArgument) {
  const Tensor q = torch::randn({2, 5, 4, 16}), table = torch::rand({5, 8});
  EXPECT_THROW(qk_norm_rotary(q[0], q, table, table), c10::ValueError);
  EXPECT_THROW(qk_norm_rotary(q, q.narrow(1, 0, 3), table, table), c10::ValueError);
  EXPECT_THROW(qk_norm_rotary(q, q, torch::rand({5, 9}), table), c10::ValueError);
  EXPECT_THROW(qk_norm_rotary(q, q, table.to(at::kDouble), table), c10::TypeError);
  EXPECT_THROW(qk_norm_rotary(q, q, table, table, torch::ones({16})), c10::ValueError);
}

}  // namespace
}  // namespace muddformer
