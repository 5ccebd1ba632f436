// The launchers of csrc/kernels/add_norm against float64 on the CPU, without torch.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "add_norm/add_norm.h"
#include "kernels_problem.cuh"

namespace muddformer::kernels {
namespace {

constexpr float kEps = 1e-5f;

struct RowShape {
  int64_t rows;
  int64_t dim;
  bool layer = false;
  bool grad_sum = true;  // the sum has a gradient of its own
  int64_t gap = 0;       // between the rows of x and residual
  int64_t offset = 0;    // elements from an aligned address
};

// X: of branch and normed tensor; S: of sum and residual.
template <typename X, typename S>
struct RowProblem {
  explicit RowProblem(const RowShape& s)
      : shape(s),
        x(s.rows, s.dim, s.dim + s.gap, s.offset),
        residual(s.rows, s.dim, s.dim + 2 * s.gap, s.offset),
        sum(s.rows, s.dim, s.dim, s.offset),
        normed(s.rows, s.dim, s.dim, s.offset),
        weight(1, s.dim, s.dim, 0),
        bias(1, s.dim, s.dim, 0),
        rstd(1, std::max<int64_t>(s.rows, 1), std::max<int64_t>(s.rows, 1), 0),
        mean(1, std::max<int64_t>(s.rows, 1), std::max<int64_t>(s.rows, 1), 0),
        grad_sum(s.rows, s.dim, s.dim + s.gap, s.offset),
        grad_normed(s.rows, s.dim, s.dim, s.offset),
        grad_residual(s.rows, s.dim, s.dim, s.offset),
        grad_x(s.rows, s.dim, s.dim, s.offset),
        grad_weight(1, s.dim, s.dim, 0),
        grad_bias(1, s.dim, s.dim, 0) {
    x.fill(1, 0.5);
    residual.fill(2);
    weight.fill(3, 1, 0.5);
    bias.fill(4);
    grad_sum.fill(5);
    grad_normed.fill(6);
  }
  ~RowProblem() { cudaFree(workspace); }
  static constexpr AddNormTypes types() { return {kDType<X>, kDType<S>, kDType<X>, true}; }
  AddNorm args() const {
    return {types(),
            shape.rows,
            shape.dim,
            shape.layer,
            kEps,
            x.data(),
            x.stride(),
            residual.data(),
            residual.stride(),
            weight.data(),
            shape.layer ? bias.data() : nullptr,
            sum.data(),
            normed.data(),
            rstd.data(),
            mean.data()};
  }
  AddNormBackward backward_args() {
    AddNormBackward b{types(),
                      shape.rows,
                      shape.dim,
                      shape.layer,
                      shape.grad_sum ? grad_sum.data() : nullptr,
                      grad_sum.stride(),
                      grad_normed.data(),
                      grad_normed.stride(),
                      sum.data(),
                      weight.data(),
                      rstd.data(),
                      mean.data(),
                      grad_residual.data(),
                      std::is_same_v<X, S> ? nullptr : grad_x.data(),
                      grad_weight.data(),
                      shape.layer ? grad_bias.data() : nullptr,
                      nullptr};
    int64_t floats = 0;
    EXPECT_EQ(cudaSuccess, add_norm_workspace(b, floats));
    if (workspace == nullptr) {
      EXPECT_EQ(cudaSuccess, cudaMalloc(&workspace, floats * sizeof(float)));
    }
    b.workspace = workspace;
    return b;
  }
  void run() {
    CUDA_OK(launch_add_norm(args(), nullptr));
    CUDA_OK(launch_add_norm_backward(backward_args(), nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    for (Matrix<S>* result : {&sum, &grad_residual}) result->download();
    for (Matrix<X>* result : {&normed, &grad_x}) result->download();
    for (Matrix<float>* result : {&rstd, &mean, &grad_weight, &grad_bias}) result->download();
    ASSERT_TRUE(sum.margin_is_poison() && normed.margin_is_poison());
    ASSERT_TRUE(grad_residual.margin_is_poison() && grad_weight.margin_is_poison());
  }

  RowShape shape;
  Matrix<X> x;
  Matrix<S> residual, sum;
  Matrix<X> normed;
  Matrix<float> weight, bias, rstd, mean;
  Matrix<S> grad_sum;
  Matrix<X> grad_normed;
  Matrix<S> grad_residual;
  Matrix<X> grad_x;
  Matrix<float> grad_weight, grad_bias;
  float* workspace = nullptr;
};

template <typename T>
void expect_near(double actual, double expected, double size) {
  ASSERT_LE(std::abs(actual - expected), 1.01 * kRounding<T> * std::abs(expected) + 1e-5 * size);
}

template <typename X, typename S>
void check(const RowShape& s) {
  RowProblem<X, S> p(s);
  ASSERT_NO_FATAL_FAILURE(p.run());
  std::vector<double> grad_weight(s.dim), grad_bias(s.dim), size_weight(s.dim), size_bias(s.dim);
  for (int64_t row = 0; row < s.rows; ++row) {
    double mean = 0, square = 0;
    for (int64_t i = 0; i < s.dim; ++i) {
      const double sum = p.x.at(row, i) + p.residual.at(row, i);
      ASSERT_NO_FATAL_FAILURE(expect_near<S>(p.sum.at(row, i), sum, std::abs(sum)));
      mean += p.sum.at(row, i) / static_cast<double>(s.dim);
    }
    if (!s.layer) mean = 0;
    for (int64_t i = 0; i < s.dim; ++i) square += std::pow(p.sum.at(row, i) - mean, 2);
    const double r = 1 / std::sqrt(square / static_cast<double>(s.dim) + kEps);
    ASSERT_LE(std::abs(p.rstd.at(0, row) - r), 1e-5 * r) << "row " << row;
    double level = 0, along = 0;
    for (int64_t i = 0; i < s.dim; ++i) {
      const double n = (p.sum.at(row, i) - mean) * r, dy = p.grad_normed.at(row, i);
      const double g = dy * p.weight.at(0, i);
      const double y = n * p.weight.at(0, i) + (s.layer ? p.bias.at(0, i) : 0);
      ASSERT_NO_FATAL_FAILURE(
          expect_near<X>(p.normed.at(row, i), y, 1 + std::abs(n) + std::abs(mean) * r));
      level += g / static_cast<double>(s.dim);
      along += g * n / static_cast<double>(s.dim);
      grad_weight[i] += dy * n;
      size_weight[i] += std::abs(dy * n);
      grad_bias[i] += dy;
      size_bias[i] += std::abs(dy);
    }
    if (!s.layer) level = 0;
    for (int64_t i = 0; i < s.dim; ++i) {
      const double n = (p.sum.at(row, i) - mean) * r;
      const double g = p.grad_normed.at(row, i) * p.weight.at(0, i);
      const double ds = s.grad_sum ? p.grad_sum.at(row, i) : 0;
      const double dx = ds + r * (g - level - n * along);
      const double size = std::abs(ds) + r * (1 + std::abs(g) + std::abs(n));
      ASSERT_NO_FATAL_FAILURE(expect_near<S>(p.grad_residual.at(row, i), dx, size))
          << "row " << row << ", column " << i;
      if (!std::is_same_v<X, S>) {
        ASSERT_NO_FATAL_FAILURE(expect_near<X>(p.grad_x.at(row, i), dx, size));
      }
    }
  }
  for (int64_t i = 0; i < s.dim; ++i) {
    ASSERT_NO_FATAL_FAILURE(
        expect_near<float>(p.grad_weight.at(0, i), grad_weight[i], 1 + size_weight[i]));
    if (s.layer) {
      ASSERT_NO_FATAL_FAILURE(
          expect_near<float>(p.grad_bias.at(0, i), grad_bias[i], 1 + size_bias[i]));
    }
  }
}

template <typename Branch, typename Stream>
struct Dtypes {
  using X = Branch;
  using S = Stream;
};

template <typename D>
class AddNormOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
  static void check_both(int64_t rows, int64_t dim, int64_t gap = 0, int64_t offset = 0) {
    using X = typename D::X;
    using S = typename D::S;
    ASSERT_NO_FATAL_FAILURE((check<X, S>({rows, dim, false, true, gap, offset}))) << dim;
    ASSERT_NO_FATAL_FAILURE((check<X, S>({rows, dim, true, true, gap, offset}))) << dim;
    ASSERT_NO_FATAL_FAILURE((check<X, S>({rows, dim, false, false, gap, offset}))) << dim;
  }
};

using RowTypes =
    testing::Types<Dtypes<float, float>, Dtypes<__nv_bfloat16, __nv_bfloat16>,
                   Dtypes<__half, __half>, Dtypes<__nv_bfloat16, float>, Dtypes<__half, float>>;
TYPED_TEST_SUITE(AddNormOf, RowTypes);

TYPED_TEST(AddNormOf, EveryWidth) {
  for (const int64_t dim : {2, 7, 8, 9, 64, 257, 1000, 1024, 2048, 2560, 4095, 4096, 8192}) {
    ASSERT_NO_FATAL_FAILURE(this->check_both(5, dim));
  }
}

TYPED_TEST(AddNormOf, WidestRows) {
  const int64_t most = 32768 / sizeof(typename TypeParam::S);
  ASSERT_NO_FATAL_FAILURE(this->check_both(3, most));
  ASSERT_NO_FATAL_FAILURE(this->check_both(3, most / 8 * 5));
}

TYPED_TEST(AddNormOf, ManyRows) {
  ASSERT_NO_FATAL_FAILURE(this->check_both(5001, 64));
  ASSERT_NO_FATAL_FAILURE(this->check_both(3001, 136));
  ASSERT_NO_FATAL_FAILURE(this->check_both(1201, 2560));  // several warps a row
}

TYPED_TEST(AddNormOf, StridesAndUnalignedRows) {
  ASSERT_NO_FATAL_FAILURE(this->check_both(37, 64, 64));
  ASSERT_NO_FATAL_FAILURE(this->check_both(37, 64, 3));
  ASSERT_NO_FATAL_FAILURE(this->check_both(37, 64, 0, 1));
}

TYPED_TEST(AddNormOf, RepeatsBitForBit) {
  using X = typename TypeParam::X;
  using S = typename TypeParam::S;
  std::vector<float> first;
  for (int run = 0; run < 5; ++run) {
    RowProblem<X, S> p({4000, 264, true});
    ASSERT_NO_FATAL_FAILURE(p.run());
    if (run == 0) first = p.grad_weight.host();
    ASSERT_EQ(0,
              std::memcmp(first.data(), p.grad_weight.host().data(), first.size() * sizeof(float)));
  }
}

TYPED_TEST(AddNormOf, RefusesWhatItCannotDo) {
  RowProblem<typename TypeParam::X, typename TypeParam::S> p({4, 64});
  AddNorm args = p.args();
  args.types.sum = DType::Float64;
  EXPECT_EQ(cudaErrorNotSupported, launch_add_norm(args, nullptr));
  args = p.args();
  args.dim = 1 << 20;
  EXPECT_EQ(cudaErrorNotSupported, launch_add_norm(args, nullptr));
  args.dim = 0;
  EXPECT_EQ(cudaErrorInvalidValue, launch_add_norm(args, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
