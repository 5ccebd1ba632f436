#include <gtest/gtest.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include "files.h"
#include "reference.h"

namespace muddformer {
namespace {

using at::Tensor;

struct Shape {
  std::vector<int64_t> leading;
  int64_t width, sources, ways;
};

std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  return out << "leading " << shape.leading << " D " << shape.width << " S " << shape.sources
             << " C " << shape.ways;
}

class DepthAggregate : public testing::TestWithParam<std::tuple<Shape, at::ScalarType>> {};

double tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-12;
    case at::kFloat:
      return 1e-5;
    case at::kHalf:
      return 3e-3;
    default:
      return 2e-2;
  }
}

// Largest difference as a fraction of the largest expected entry.
double relative_error(const Tensor& actual, const Tensor& expected) {
  if (expected.numel() == 0) return 0;
  return ((actual.to(at::kDouble) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
      .item<double>();
}

std::vector<int64_t> extended(std::vector<int64_t> shape, std::initializer_list<int64_t> more) {
  shape.insert(shape.end(), more);
  return shape;
}

TEST_P(DepthAggregate, ForwardAndGradientsEqualTheNaiveOnes) {
  const auto& [shape, dtype] = GetParam();
  torch::manual_seed(0);
  const auto options = at::TensorOptions(dtype).requires_grad(true);
  std::vector<Tensor> hiddens, wide;
  for (int64_t j = 0; j < shape.sources; ++j) {
    hiddens.push_back(torch::randn(extended(shape.leading, {shape.width}), options));
    wide.push_back(hiddens.back().detach().to(at::kDouble).requires_grad_());
  }
  const Tensor weights =
      torch::randn(extended(shape.leading, {shape.ways, shape.sources}), options);
  const Tensor wide_weights = weights.detach().to(at::kDouble).requires_grad_();

  const auto [streams, handed_on] = depth_aggregate_chained(hiddens, weights);
  const std::vector<Tensor> expected = reference::depth_aggregate(wide, wide_weights);
  ASSERT_EQ(streams.size(), static_cast<size_t>(shape.ways));
  ASSERT_EQ(handed_on.size(), hiddens.size());
  Tensor loss = torch::zeros({}, at::kDouble), wide_loss = torch::zeros({}, at::kDouble);
  for (size_t c = 0; c < streams.size(); ++c) {
    EXPECT_EQ(streams[c].scalar_type(), dtype);
    EXPECT_LT(relative_error(streams[c], expected[c]), tolerance(dtype));
    const Tensor factor = torch::randn_like(streams[c]);
    loss = loss + (streams[c] * factor).to(at::kDouble).sum();
    wide_loss = wide_loss + (expected[c] * factor).sum();
  }
  loss = loss + 2 * handed_on[0].to(at::kDouble).sum();
  wide_loss = wide_loss + 2 * wide[0].sum();
  loss.backward();
  wide_loss.backward();
  EXPECT_LT(relative_error(weights.grad(), wide_weights.grad()), tolerance(dtype));
  for (size_t j = 0; j < hiddens.size(); ++j) {
    EXPECT_LT(relative_error(hiddens[j].grad(), wide[j].grad()), tolerance(dtype));
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, DepthAggregate,
    testing::Combine(testing::Values(Shape{{1}, 1, 1, 1}, Shape{{3}, 7, 2, 4},
                                     Shape{{2, 5}, 33, 5, 3}, Shape{{4}, 64, 13, 4},
                                     Shape{{2}, 100, 9, 6}, Shape{{6}, 130, 65, 2},
                                     Shape{{2, 0}, 8, 3, 4}, Shape{{}, 16, 3, 4}),
                     testing::Values(at::kDouble, at::kFloat, at::kBFloat16, at::kHalf)));

TEST(DepthAggregateErrors, TicketsWithoutGradients) {
  const std::vector<at::Tensor> hiddens(2, torch::randn({2, 3, 8}));
  const at::Tensor weights = torch::randn({2, 3, 1, 2}).requires_grad_();
  const auto [older, deferrals] = defer_gradients(hiddens, {1}, {2});
  EXPECT_EQ(std::get<0>(depth_aggregate_chained(older, weights, deferrals[0])).size(), 1);
  const auto young = hiddens[0].clone().requires_grad_();
  testing_files::expect_error(
      [&] { depth_aggregate_chained({young, young}, weights, deferrals[0]); },
      "as hiddens[0] does, got tickets without gradients");
}

TEST(DepthAggregateErrors, NameTheArgument) {
  const std::vector<Tensor> hiddens = {torch::zeros({2, 8}), torch::zeros({2, 8})};
  const auto message = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  EXPECT_NE(message([] { depth_aggregate({}, Tensor()); }).find("weights: expected a tensor"),
            std::string::npos);
  EXPECT_NE(message([] { depth_aggregate({}, torch::zeros({4, 0})); }).find("hiddens:"),
            std::string::npos);
  EXPECT_NE(message([&] { depth_aggregate(hiddens, torch::zeros({2, 4, 3})); }).find("weights:"),
            std::string::npos);
  EXPECT_NE(message([&] {
              depth_aggregate({hiddens[0], torch::zeros({2, 9})}, torch::zeros({2, 4, 2}));
            }).find("hiddens[1]:"),
            std::string::npos);
  EXPECT_NE(message([&] {
              depth_aggregate(hiddens, torch::zeros({2, 4, 2}, at::kDouble));
            }).find("weights:"),
            std::string::npos);
}

}  // namespace
}  // namespace muddformer
