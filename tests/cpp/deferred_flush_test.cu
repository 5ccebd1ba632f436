// The launcher of csrc/kernels/deferred_flush against a float64 reference on the CPU, without
// torch.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "deferred_flush/deferred_flush.h"
#include "kernels_problem.cuh"

namespace muddformer::kernels {
namespace {

struct FlushShape {
  int64_t tokens;
  int64_t dim;
  int sources;
  int factors;
};

// Factors k of layers of three ways, whose weights have more sources than are flushed; every fourth
// layer has one block of weights for all tokens. Some gradients are missing.
template <typename T>
struct FlushProblem {
  explicit FlushProblem(const FlushShape& s) : shape(s), columns(s.sources + 2) {
    for (int k = 0; k < s.factors; ++k) {
      if (k % 3 == 0) {
        const bool one = k / 3 % 4 == 3;
        w.push_back(std::make_unique<Matrix<T>>(one ? 1 : s.tokens, 3 * columns, 3 * columns, 0));
        w.back()->fill(10 + k);
        stride.push_back(one ? 0 : 3 * columns);
      }
      dv.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, 0));
      dv.back()->fill(500 + k);
      dv_pointers.push_back(dv.back()->data());
      w_pointers.push_back(w.back()->data() + k % 3 * columns);
      w_strides.push_back(stride.back());
    }
    for (int j = 0; j < s.sources; ++j) {
      grad_in.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, 0));
      grad_in.back()->fill(2000 + j);
      grad_out.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, 0));
      grad_in_pointers.push_back(j % 4 == 2 ? nullptr : grad_in.back()->data());
      grad_out_pointers.push_back(grad_out.back()->data());
    }
  }
  DeferredFlush args() const {
    return {kDType<T>,
            shape.tokens,
            shape.dim,
            shape.sources,
            shape.factors,
            dv_pointers.data(),
            w_pointers.data(),
            w_strides.data(),
            grad_in_pointers.data(),
            grad_out_pointers.data()};
  }

  FlushShape shape;
  int64_t columns;
  Matrices<T> w, dv, grad_in, grad_out;
  std::vector<const void*> dv_pointers, w_pointers, grad_in_pointers;
  std::vector<void*> grad_out_pointers;
  std::vector<int64_t> stride, w_strides;
};

template <typename T>
void check_flush(const FlushShape& s) {
  FlushProblem<T> p(s);
  CUDA_OK(launch_deferred_flush(p.args(), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  for (int j = 0; j < s.sources; ++j) {
    p.grad_out[j]->download();
    ASSERT_TRUE(p.grad_out[j]->margin_is_poison());
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t i = 0; i < s.dim; ++i) {
        double sum = p.grad_in_pointers[j] != nullptr ? p.grad_in[j]->at(t, i) : 0;
        double magnitude = std::abs(sum);
        for (int k = 0; k < s.factors; ++k) {
          const int64_t row = p.w_strides[k] == 0 ? 0 : t;
          const double term = p.w[k / 3]->at(row, k % 3 * p.columns + j) * p.dv[k]->at(t, i);
          sum += term;
          magnitude += std::abs(term);
        }
        // Past 16 factors the sum so far is rounded in between.
        const double between = (s.factors - 1) / 16 * kRounding<T> * magnitude;
        ASSERT_LE(std::abs(p.grad_out[j]->at(t, i) - sum),
                  1.01 * kRounding<T> * std::abs(sum) + 4e-6 * magnitude + between + 0x1p-25)
            << "source " << j << ", token " << t << ", column " << i;
      }
    }
  }
}

template <typename T>
class FlushOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

using NarrowTypes = testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(FlushOf, NarrowTypes);

TYPED_TEST(FlushOf, EveryWidth) {
  for (const int64_t dim : {8, 64, 248, 256, 264, 1000, 1024, 2048, 2560, 4096}) {
    ASSERT_NO_FATAL_FAILURE(check_flush<TypeParam>({5, dim, 7, 16}));
  }
}

TYPED_TEST(FlushOf, EveryNumberOfSourcesAndFactors) {
  for (const int sources : {1, 2, 8, 9, 15, 16, 17, 24, 25, 31, 32, 33, 40, 63, 64, 65, 130}) {
    for (const int factors : {1, 3, 13, 16, 17, 40}) {
      ASSERT_NO_FATAL_FAILURE(check_flush<TypeParam>({3, 264, sources, factors}));
    }
  }
}

TYPED_TEST(FlushOf, ManyTokens) {
  ASSERT_NO_FATAL_FAILURE(check_flush<TypeParam>({3001, 16, 5, 16}));
  ASSERT_NO_FATAL_FAILURE(check_flush<TypeParam>({700, 520, 18, 16}));
}

TYPED_TEST(FlushOf, RepeatsBitForBit) {
  FlushProblem<TypeParam> p({400, 512, 20, 16});
  std::vector<TypeParam> first;
  for (int run = 0; run < 20; ++run) {
    CUDA_OK(launch_deferred_flush(p.args(), nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    p.grad_out[19]->download();
    if (run == 0) first = p.grad_out[19]->host();
    ASSERT_EQ(0, std::memcmp(first.data(), p.grad_out[19]->host().data(),
                             first.size() * sizeof(TypeParam)));
  }
}

TYPED_TEST(FlushOf, RefusesWhatItCannotDo) {
  FlushProblem<TypeParam> p({4, 64, 3, 2});
  DeferredFlush args = p.args();
  args.dtype = DType::Float32;
  EXPECT_EQ(cudaErrorNotSupported, launch_deferred_flush(args, nullptr));
  args = p.args();
  args.dim = 63;
  EXPECT_EQ(cudaErrorNotSupported, launch_deferred_flush(args, nullptr));
  args = p.args();
  args.factors = 0;
  EXPECT_EQ(cudaErrorInvalidValue, launch_deferred_flush(args, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
