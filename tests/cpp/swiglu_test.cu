// The launchers of csrc/kernels/swiglu against float64 on the CPU, without torch.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels_problem.cuh"
#include "swiglu/swiglu.h"

namespace muddformer::kernels {
namespace {

struct GateShape {
  int64_t rows;
  int64_t width;
  int64_t gap = 0;     // between the rows of g and u
  int64_t offset = 0;  // elements from an aligned address, of everything
};

template <typename T>
struct GateProblem {
  explicit GateProblem(const GateShape& s)
      : shape(s),
        gate(s.rows, s.width, s.width + s.gap, s.offset),
        up(s.rows, s.width, s.width + 2 * s.gap, s.offset),
        grad(s.rows, s.width, s.width + s.gap, s.offset),
        out(s.rows, s.width, s.width, s.offset),
        grad_gate(s.rows, s.width, s.width, s.offset),
        grad_up(s.rows, s.width, s.width, s.offset) {
    gate.fill(1, 0, 8);
    up.fill(2);
    grad.fill(3);
  }
  Swiglu args() const {
    return {kDType<T>,     shape.rows, shape.width, gate.data(),
            gate.stride(), up.data(),  up.stride(), out.data()};
  }
  SwigluBackward backward_args() const {
    return {args(),           grad.data(),    grad.stride(),
            grad_gate.data(), grad_up.data(), grad_gate.stride()};
  }

  GateShape shape;
  Matrix<T> gate, up, grad, out, grad_gate, grad_up;
};

template <typename T>
void expect_near(const Matrix<T>& actual, int64_t row, int64_t i, double expected, double size) {
  ASSERT_LE(std::abs(actual.at(row, i) - expected),
            1.01 * kRounding<T> * std::abs(expected) + 4e-6 * size + 0x1p-25)
      << "row " << row << ", column " << i;
}

template <typename T>
void check(const GateShape& s) {
  GateProblem<T> p(s);
  CUDA_OK(launch_swiglu(p.args(), nullptr));
  CUDA_OK(launch_swiglu_backward(p.backward_args(), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  for (Matrix<T>* result : {&p.out, &p.grad_gate, &p.grad_up}) {
    result->download();
    ASSERT_TRUE(result->margin_is_poison());
  }
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int64_t i = 0; i < s.width; ++i) {
      const double g = p.gate.at(row, i), u = p.up.at(row, i), dy = p.grad.at(row, i);
      const double s_of_g = 1 / (1 + std::exp(-g)), silu = g * s_of_g;
      ASSERT_NO_FATAL_FAILURE(expect_near(p.out, row, i, silu * u, std::abs(silu * u)));
      ASSERT_NO_FATAL_FAILURE(expect_near(p.grad_up, row, i, dy * silu, std::abs(dy * silu)));
      ASSERT_NO_FATAL_FAILURE(expect_near(p.grad_gate, row, i,
                                          dy * u * s_of_g * (1 + g * (1 - s_of_g)),
                                          std::abs(dy * u) * (1 + std::abs(g))));
    }
  }
}

template <typename T>
class SwigluOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

using GateTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(SwigluOf, GateTypes);

TYPED_TEST(SwigluOf, EveryWidth) {
  for (const int64_t width : {1, 2, 7, 8, 9, 64, 257, 1000, 4096}) {
    ASSERT_NO_FATAL_FAILURE(check<TypeParam>({5, width}));
  }
}

TYPED_TEST(SwigluOf, StridesAndUnalignedRows) {
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({37, 64, 64}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({37, 264, 8}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({37, 64, 3}));
  ASSERT_NO_FATAL_FAILURE(check<TypeParam>({37, 64, 0, 1}));
}

TYPED_TEST(SwigluOf, NoRows) {
  GateProblem<TypeParam> p({0, 64});
  CUDA_OK(launch_swiglu(p.args(), nullptr));
  CUDA_OK(launch_swiglu_backward(p.backward_args(), nullptr));
}

TYPED_TEST(SwigluOf, RefusesWhatItCannotDo) {
  GateProblem<TypeParam> p({4, 64});
  Swiglu args = p.args();
  args.dtype = DType::Float64;
  EXPECT_EQ(cudaErrorNotSupported, launch_swiglu(args, nullptr));
  args = p.args();
  args.rows = int64_t{1} << 26;
  EXPECT_EQ(cudaErrorNotSupported, launch_swiglu(args, nullptr));
  args.rows = -1;
  EXPECT_EQ(cudaErrorInvalidValue, launch_swiglu(args, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
