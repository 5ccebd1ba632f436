// The launchers of csrc/kernels/qk_norm_rotary against float64 on the CPU, without torch.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels_problem.cuh"
#include "qk_norm_rotary/qk_norm_rotary.h"

namespace muddformer::kernels {
namespace {

constexpr float kEps = 1e-5f;

struct HeadShape {
  int64_t batch;
  int64_t tokens;
  int heads[2];
  int width;
  int half;
  bool norms = true;
  int gap = 0;                 // between heads
  bool own_positions = false;  // every batch has tables of its own
  bool heads_first = false;    // results are [batch, heads, tokens, E] in memory
};

template <typename T>
struct HeadProblem {
  explicit HeadProblem(const HeadShape& s) : shape(s) {
    const int64_t positions = s.tokens * (s.own_positions ? s.batch : 1);
    angles[0] =
        std::make_unique<Matrix<float>>(positions, std::max(s.half, 1), std::max(s.half, 1), 0);
    angles[1] =
        std::make_unique<Matrix<float>>(positions, std::max(s.half, 1), std::max(s.half, 1), 0);
    angles[0]->fill(1);
    angles[1]->fill(2);
    for (int which : {kQueries, kKeys}) {
      const int64_t rows = s.batch * s.tokens * s.heads[which];
      for (auto* list : {&x, &y, &dy, &dx}) {
        const bool given = list == &x || list == &dy;
        list->push_back(
            std::make_unique<Matrix<T>>(rows, s.width, s.width + (given ? s.gap : 0), 0));
      }
      x[which]->fill(3 + which);
      dy[which]->fill(5 + which);
      weight.push_back(std::make_unique<Matrix<float>>(1, s.width, s.width, 0));
      grad_weight.push_back(std::make_unique<Matrix<float>>(1, s.width, s.width, 0));
      weight[which]->fill(7 + which, 1, 0.5);
    }
  }
  ~HeadProblem() { cudaFree(workspace); }

  // Where a head of a token is among the rows of a matrix.
  int64_t row(int which, int64_t batch, int64_t token, int64_t head, bool first) const {
    const int64_t heads = shape.heads[which];
    return first ? (batch * heads + head) * shape.tokens + token
                 : (batch * shape.tokens + token) * heads + head;
  }
  Heads place(const Matrix<T>& of, int which, bool first) const {
    const int64_t stride = of.stride(), heads = shape.heads[which];
    return {of.data(), shape.tokens * heads * stride, first ? stride : heads * stride,
            first ? shape.tokens * stride : stride};
  }
  QkNormRotary args() const {
    QkNormRotary p{};
    p.dtype = kDType<T>;
    p.wide = true;
    p.batch = shape.batch;
    p.tokens = shape.tokens;
    p.head_dim = shape.width;
    p.half = shape.half;
    p.eps = kEps;
    p.cos = angles[0]->data();
    p.sin = angles[1]->data();
    p.rotary_token_stride = angles[0]->stride();
    p.rotary_batch_stride = shape.own_positions ? shape.tokens * angles[0]->stride() : 0;
    for (int which : {kQueries, kKeys}) {
      p.heads[which] = shape.heads[which];
      if (shape.norms) p.weight[which] = weight[which]->data();
      p.x[which] = place(*x[which], which, false);
      p.y[which] = place(*y[which], which, shape.heads_first);
    }
    return p;
  }
  QkNormRotaryBackward backward_args() {
    QkNormRotaryBackward b{};
    b.forward = args();
    for (int which : {kQueries, kKeys}) {
      b.forward.y[which] = {};
      b.dy[which] = place(*dy[which], which, shape.heads_first);
      b.dx[which] = place(*dx[which], which, false);
      b.grad_weight[which] = shape.norms ? grad_weight[which]->data() : nullptr;
    }
    int64_t floats = 0;
    EXPECT_EQ(cudaSuccess, qk_norm_rotary_workspace(b, floats));
    if (workspace == nullptr) {
      EXPECT_EQ(cudaSuccess, cudaMalloc(&workspace, (floats + 1) * sizeof(float)));
    }
    b.workspace = workspace;
    return b;
  }
  void run() {
    CUDA_OK(launch_qk_norm_rotary(args(), nullptr));
    CUDA_OK(launch_qk_norm_rotary_backward(backward_args(), nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    for (int which : {kQueries, kKeys}) {
      y[which]->download();
      dx[which]->download();
      grad_weight[which]->download();
      ASSERT_TRUE(y[which]->margin_is_poison() && dx[which]->margin_is_poison());
      ASSERT_TRUE(grad_weight[which]->margin_is_poison());
    }
  }

  HeadShape shape;
  std::unique_ptr<Matrix<float>> angles[2];
  Matrices<T> x, y, dy, dx;
  Matrices<float> weight, grad_weight;
  float* workspace = nullptr;
};

template <typename T>
void expect_near(double actual, double expected, double size) {
  ASSERT_LE(std::abs(actual - expected), 1.01 * kRounding<T> * std::abs(expected) + 1e-5 * size);
}

// One head, forward and backward; adds to the gradient of the weight.
template <typename T>
void check_head(const HeadProblem<T>& p, int which, int64_t batch, int64_t token, int64_t head,
                std::vector<double>& grad_weight) {
  const HeadShape& s = p.shape;
  const int64_t given = p.row(which, batch, token, head, false);
  const int64_t made = p.row(which, batch, token, head, s.heads_first);
  const int64_t position = token + (s.own_positions ? batch * s.tokens : 0);
  const auto x = [&](int i) { return p.x[which]->at(given, i); };
  const auto weight = [&](int i) { return s.norms ? p.weight[which]->at(0, i) : 1.0; };
  double square = 0;
  for (int i = 0; i < s.width; ++i) square += x(i) * x(i);
  const double r = s.norms ? 1 / std::sqrt(square / s.width + kEps) : 1;
  std::vector<double> n(s.width), y(s.width), dn(s.width);
  for (int i = 0; i < s.width; ++i) {
    n[i] = x(i) * r * weight(i);
    y[i] = n[i];
    dn[i] = p.dy[which]->at(made, i);
  }
  for (int i = 0; i < s.half; ++i) {
    const double c = p.angles[0]->at(position, i), t = p.angles[1]->at(position, i);
    y[i] = n[i] * c - n[i + s.half] * t;
    y[i + s.half] = n[i] * t + n[i + s.half] * c;
    const double a = dn[i], b = dn[i + s.half];
    dn[i] = a * c + b * t;
    dn[i + s.half] = b * c - a * t;
  }
  double along = 0;
  for (int i = 0; i < s.width; ++i) along += dn[i] * weight(i) * x(i) * r / s.width;
  for (int i = 0; i < s.width; ++i) {
    ASSERT_NO_FATAL_FAILURE(expect_near<T>(p.y[which]->at(made, i), y[i], 3))
        << "head " << head << ", entry " << i;
    const double g = dn[i] * weight(i), u = x(i) * r;
    const double dx = s.norms ? r * (g - u * along) : dn[i];
    ASSERT_NO_FATAL_FAILURE(expect_near<T>(p.dx[which]->at(given, i), dx, 3 * r))
        << "gradient of head " << head << ", entry " << i;
    grad_weight[i] += dn[i] * u;
  }
}

template <typename T>
void check(const HeadShape& s) {
  HeadProblem<T> p(s);
  ASSERT_NO_FATAL_FAILURE(p.run());
  for (int which : {kQueries, kKeys}) {
    std::vector<double> grad_weight(s.width);
    for (int64_t b = 0; b < s.batch; ++b) {
      for (int64_t t = 0; t < s.tokens; ++t) {
        for (int64_t h = 0; h < s.heads[which]; ++h) {
          ASSERT_NO_FATAL_FAILURE(check_head(p, which, b, t, h, grad_weight));
        }
      }
    }
    const double count = static_cast<double>(s.batch * s.tokens * s.heads[which]);
    for (int i = 0; s.norms && i < s.width; ++i) {
      ASSERT_NO_FATAL_FAILURE(
          expect_near<float>(p.grad_weight[which]->at(0, i), grad_weight[i], 1 + count));
    }
  }
}

template <typename T>
class QkNormRotaryOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

using HeadTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(QkNormRotaryOf, HeadTypes);

TYPED_TEST(QkNormRotaryOf, EveryWidthAndRotation) {
  for (const int width : {2, 6, 16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256}) {
    for (const int half : {width / 2, width / 8, 0}) {
      for (const bool norms : {true, false}) {
        ASSERT_NO_FATAL_FAILURE(check<TypeParam>({2, 5, {6, 2}, width, half, norms}))
            << width << ", half " << half << ", norms " << norms;
      }
    }
  }
}

TYPED_TEST(QkNormRotaryOf, EveryNumberOfHeads) {
  for (const int heads : {1, 2, 3, 5, 8, 12, 33}) {
    ASSERT_NO_FATAL_FAILURE(check<TypeParam>({2, 7, {heads, 1}, 64, 32}));
    ASSERT_NO_FATAL_FAILURE(check<TypeParam>({1, 3, {heads, heads}, 128, 16}));
    ASSERT_NO_FATAL_FAILURE(check<TypeParam>({2, 7, {heads, 2}, 80, 40}));
  }
}

TYPED_TEST(QkNormRotaryOf, ManyTokens) {
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({3, 1001, {4, 2}, 64, 32}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({3, 1001, {4, 2}, 80, 40}));
}

TYPED_TEST(QkNormRotaryOf, LayoutsAndPositions) {
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({2, 9, {4, 2}, 64, 32, true, 64}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({2, 9, {4, 2}, 64, 32, true, 3}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({3, 9, {4, 2}, 64, 16, true, 0, true}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({3, 9, {4, 2}, 64, 16, false, 0, true, true}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({3, 9, {4, 2}, 80, 40, true, 8, false, true}));
}

TYPED_TEST(QkNormRotaryOf, RepeatsBitForBit) {
  for (const int width : {64, 80}) {
    std::vector<float> first;
    for (int run = 0; run < 5; ++run) {
      HeadProblem<TypeParam> p({2, 500, {12, 4}, width, width / 2});
      ASSERT_NO_FATAL_FAILURE(p.run());
      if (run == 0) first = p.grad_weight[0]->host();
      ASSERT_EQ(0, std::memcmp(first.data(), p.grad_weight[0]->host().data(),
                               first.size() * sizeof(float)));
    }
  }
}

TYPED_TEST(QkNormRotaryOf, RefusesWhatItCannotDo) {
  HeadProblem<TypeParam> p({1, 2, {2, 2}, 64, 32});
  QkNormRotary args = p.args();
  args.dtype = DType::Float64;
  EXPECT_EQ(cudaErrorNotSupported, launch_qk_norm_rotary(args, nullptr));
  args = p.args();
  args.head_dim = 63;
  args.half = 8;
  EXPECT_EQ(cudaErrorNotSupported, launch_qk_norm_rotary(args, nullptr));
  args = p.args();
  args.half = 33;
  EXPECT_EQ(cudaErrorInvalidValue, launch_qk_norm_rotary(args, nullptr));
  args = p.args();
  args.weight[kKeys] = nullptr;
  EXPECT_EQ(cudaErrorInvalidValue, launch_qk_norm_rotary(args, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
