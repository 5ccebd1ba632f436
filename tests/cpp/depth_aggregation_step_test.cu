// The launcher of csrc/kernels/depth_aggregation_step against a float64 reference on the CPU:
// every dtype, option and odd shape, without torch.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "depth_aggregation_step/depth_aggregation_step.h"
#include "kernels_problem.cuh"

namespace muddformer::kernels {
namespace {

struct StepShape {
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
  int hidden;
  int normed = 0;  // so many of the first ways have a norm
  bool layer_norm = false;
  bool wide = false;  // float32 parameters
  bool scale = false;
  bool gelu_tanh = false;
  float cap = 0.0f;
  int64_t gap = 0;  // elements between the rows of X_j, more for every other source
};

void PrintTo(const StepShape& s, std::ostream* os) {
  *os << s.tokens << " x " << s.dim << ", S " << s.sources << ", C " << s.ways << ", K " << s.hidden
      << ", normed " << s.normed << (s.layer_norm ? " layer" : "") << (s.wide ? ", wide" : "")
      << (s.scale ? ", scale" : "") << (s.gelu_tanh ? ", tanh" : "") << ", cap " << s.cap
      << ", gap " << s.gap;
}

// A small parameter of type T or float.
template <typename T>
class Parameter {
 public:
  Parameter(int64_t count, bool wide, uint64_t tensor)
      : narrow_(1, count, count, 0), wide_(1, count, count, 0), is_wide_(wide) {
    fill(tensor);
  }
  void fill(uint64_t tensor, double size = 1) {
    narrow_.fill(tensor, 0, size);
    wide_.fill(tensor, 0, size);
  }
  const void* data() const {
    return is_wide_ ? static_cast<const void*>(wide_.data()) : narrow_.data();
  }
  double at(int64_t i) const { return is_wide_ ? wide_.at(0, i) : narrow_.at(0, i); }

 private:
  Matrix<T> narrow_;
  Matrix<float> wide_;
  bool is_wide_;
};

template <typename T>
struct StepProblem {
  explicit StepProblem(const StepShape& s)
      : shape(s),
        w1(std::max(s.hidden, 1), s.dim, s.dim, 0),
        w2(s.ways * s.sources, std::max(s.hidden, 1), std::max(s.hidden, 1), 0),
        prior(s.ways * s.sources, s.wide, 3),
        scale(s.dim, s.wide, 4) {
    w1.fill(1);
    w2.fill(2);
    for (int j = 0; j < s.sources; ++j) {
      x.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim + s.gap * (1 + j % 2), 0));
      x.back()->fill(100 + j);
      x_pointers.push_back(x.back()->data());
      x_strides.push_back(x.back()->stride());
    }
    for (int c = 0; c < s.ways; ++c) {
      y.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, 0));
      y_pointers.push_back(y.back()->data());
      norm_weight.push_back(std::make_unique<Parameter<T>>(s.dim, s.wide, 20 + c));
      norm_bias.push_back(std::make_unique<Parameter<T>>(s.dim, s.wide, 40 + c));
      weight_pointers.push_back(c < s.normed ? norm_weight[c]->data() : nullptr);
      bias_pointers.push_back(c < s.normed && s.layer_norm ? norm_bias[c]->data() : nullptr);
    }
  }

  AggregationStep args() const {
    AggregationStep a{};
    a.dtype = kDType<T>;
    a.tokens = shape.tokens;
    a.dim = shape.dim;
    a.sources = shape.sources;
    a.ways = shape.ways;
    a.hidden = shape.hidden;
    a.x = x_pointers.data();
    a.x_stride = x_strides.data();
    a.w1 = shape.hidden > 0 ? w1.data() : nullptr;
    a.w2 = shape.hidden > 0 ? w2.data() : nullptr;
    a.wide = shape.wide;
    a.prior = prior.data();
    a.scale = shape.scale ? scale.data() : nullptr;
    a.eps = 1e-3f;
    a.gelu_tanh = shape.gelu_tanh;
    a.cap = shape.cap;
    a.layer_norm = shape.layer_norm;
    a.norm_eps = 1e-2f;
    a.norm_weight = weight_pointers.data();
    a.norm_bias = bias_pointers.data();
    a.y = y_pointers.data();
    return a;
  }

  std::vector<double> weights(int64_t t) const {
    const Matrix<T>& newest = *x.back();
    std::vector<double> a(shape.ways * shape.sources);
    double squares = 0;
    for (int64_t i = 0; i < shape.dim; ++i) squares += newest.at(t, i) * newest.at(t, i);
    const double factor = 1 / std::sqrt(squares / shape.dim + 1e-3f);
    std::vector<double> gelu(shape.hidden);
    for (int k = 0; k < shape.hidden; ++k) {
      double h = 0;
      for (int64_t i = 0; i < shape.dim; ++i)
        h += newest.at(t, i) * factor * (shape.scale ? scale.at(i) : 1.0) * w1.at(k, i);
      const double phi = shape.gelu_tanh
                             ? std::tanh(0.7978845608028654 * (h + 0.044715 * h * h * h))
                             : std::erf(h * 0.7071067811865476);
      gelu[k] = 0.5 * h * (1 + phi);
    }
    for (size_t n = 0; n < a.size(); ++n) {
      a[n] = prior.at(n);
      for (int k = 0; k < shape.hidden; ++k) a[n] += gelu[k] * w2.at(n, k);
      if (shape.cap > 0) a[n] = shape.cap * std::tanh(a[n] / shape.cap);
    }
    return a;
  }

  std::vector<double> stream(int64_t t, int c, const std::vector<double>& a) const {
    std::vector<double> out(shape.dim);
    double mean = 0;
    for (int64_t i = 0; i < shape.dim; ++i) {
      for (int j = 0; j < shape.sources; ++j) out[i] += a[c * shape.sources + j] * x[j]->at(t, i);
      mean += shape.layer_norm ? out[i] / shape.dim : 0;
    }
    if (c >= shape.normed) return out;
    double squares = 0;
    for (const double value : out) squares += (value - mean) * (value - mean);
    const double factor = 1 / std::sqrt(squares / shape.dim + 1e-2f);
    for (int64_t i = 0; i < shape.dim; ++i) {
      out[i] = (out[i] - mean) * factor * norm_weight[c]->at(i);
      if (shape.layer_norm) out[i] += norm_bias[c]->at(i);
    }
    return out;
  }

  StepShape shape;
  Matrix<T> w1, w2;
  Parameter<T> prior, scale;
  Matrices<T> x, y;
  std::vector<std::unique_ptr<Parameter<T>>> norm_weight, norm_bias;
  std::vector<const void*> x_pointers, weight_pointers, bias_pointers;
  std::vector<void*> y_pointers;
  std::vector<int64_t> x_strides;
};

template <typename T>
void check_step(StepProblem<T>& p) {
  const StepShape& shape = p.shape;
  CUDA_OK(launch_aggregation_step(p.args(), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  for (auto& y : p.y) {
    y->download();
    ASSERT_TRUE(y->margin_is_poison());
  }
  for (int64_t t = 0; t < shape.tokens; ++t) {
    const std::vector<double> a = p.weights(t);
    for (int c = 0; c < shape.ways; ++c) {
      const std::vector<double> exact = p.stream(t, c, a);
      double largest = 0;
      for (const double value : exact) largest = std::max(largest, std::abs(value));
      for (int64_t i = 0; i < shape.dim; ++i) {
        const double bound = 1.01 * kRounding<T> * std::abs(exact[i]) + 2e-5 * largest + 0x1p-25;
        ASSERT_LE(std::abs(p.y[c]->at(t, i) - exact[i]), bound)
            << "way " << c << " of token " << t << ", column " << i;
      }
    }
  }
}

template <typename T>
void check_step(const StepShape& shape) {
  SCOPED_TRACE(testing::PrintToString(shape));
  StepProblem<T> p(shape);
  check_step(p);
}

template <typename T>
class DepthAggregationStepOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device";
    int major = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    if (major < 9) GTEST_SKIP() << "needs compute capability 9.0";
  }
};

using StepTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(DepthAggregationStepOf, StepTypes);

TYPED_TEST(DepthAggregationStepOf, EveryWidthAndHiddenWidth) {
  for (const int64_t dim : {8, 64, 136, 256, 1000, 1024, 2560, 5120}) {
    for (const int hidden : {0, 4, 64, 100, 192}) {
      ASSERT_NO_FATAL_FAILURE(check_step<TypeParam>({2, dim, 5, 4, hidden}));
    }
  }
  ASSERT_NO_FATAL_FAILURE(check_step<TypeParam>({1, 2560, 33, 4, 192, 3}));
  ASSERT_NO_FATAL_FAILURE(check_step<TypeParam>({1, 256, 33, 1, 1024, 1}));  // many rows in a block
  for (const int64_t tokens : {3, 20}) {  // several passes over the columns of a block
    ASSERT_NO_FATAL_FAILURE(check_step<TypeParam>({tokens, 5120, 17, 5, 24, 4, true}));
  }
}

TYPED_TEST(DepthAggregationStepOf, EveryNumberOfSourcesWaysAndTokens) {
  for (const int ways : {1, 2, 3, 4, 5, 8}) {
    for (const int sources : {1, 2, 7, 33, 64, 100}) {
      for (const int64_t dim : {128, 256}) {  // a multiple of 256 may have the kernel with kOnce
        ASSERT_NO_FATAL_FAILURE(check_step<TypeParam>({3, dim, sources, ways, 16, ways - 1}));
      }
    }
  }
  for (const int64_t tokens : {1, 4, 8, 9, 15, 17, 30, 64}) {
    for (const int64_t dim : {128, 256}) {
      ASSERT_NO_FATAL_FAILURE(check_step<TypeParam>({tokens, dim, 6, 4, 44, 3}));
    }
  }
}

TYPED_TEST(DepthAggregationStepOf, EveryOption) {
  for (const int64_t tokens : {1, 11, 18}) {
    for (const bool layer_norm : {false, true}) {
      for (const bool wide : {false, true}) {
        for (const bool scale : {false, true}) {
          for (const int hidden : {0, 24}) {
            for (const bool tanh : {false, true}) {
              for (const int64_t dim : {256, 264}) {
                ASSERT_NO_FATAL_FAILURE(
                    check_step<TypeParam>({tokens, dim, 5, 4, hidden, 3, layer_norm, wide, scale,
                                           tanh, wide ? 2.0f : 0.0f, scale ? 16 : 0}));
              }
            }
          }
        }
      }
    }
  }
}

// A small number of 16 bits has few digits, or none: A must not be rounded to one.
TYPED_TEST(DepthAggregationStepOf, SmallWeightsOfLargeSources) {
  for (const int sources : {1, 20}) {
    StepProblem<TypeParam> p({2, 256, sources, 4, 0, 0, false, true});
    p.prior.fill(3, 1e-5);
    for (int j = 0; j < sources; ++j) p.x[j]->fill(100 + j, 0, 1e4);
    ASSERT_NO_FATAL_FAILURE(check_step(p));
  }
}

TYPED_TEST(DepthAggregationStepOf, InfiniteSources) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  for (const int hidden : {0, 64}) {
    for (const int64_t tokens : {1, 3}) {
      StepProblem<TypeParam> p({tokens, 256, 3, 4, hidden, 0, false, true});
      p.x[0]->fill(100, kInfinity, 0);
      CUDA_OK(launch_aggregation_step(p.args(), nullptr));
      for (int c = 0; c < 4; ++c) {
        p.y[c]->download();
        for (int64_t t = 0; t < tokens; ++t) {
          const double weight = p.weights(t)[c * 3];
          ASSERT_GT(std::abs(weight), 1e-3);  // has a sign that rounding cannot change
          for (int64_t i = 0; i < 256; ++i) {
            ASSERT_EQ(weight * kInfinity, p.y[c]->at(t, i)) << "way " << c << ", token " << t;
          }
        }
      }
    }
  }
}

TYPED_TEST(DepthAggregationStepOf, RepeatsBitForBit) {
  StepProblem<TypeParam> p({9, 2560, 33, 4, 192, 3});
  std::vector<std::vector<TypeParam>> first;
  for (int run = 0; run < 200; ++run) {
    for (void* y : p.y_pointers) {
      CUDA_OK(cudaMemsetAsync(y, 0xff, 9 * 2560 * sizeof(TypeParam)));
    }
    CUDA_OK(launch_aggregation_step(p.args(), nullptr));
    for (size_t c = 0; c < p.y.size(); ++c) {
      p.y[c]->download();
      if (run == 0) first.push_back(p.y[c]->host());
      ASSERT_EQ(0, std::memcmp(first[c].data(), p.y[c]->host().data(),
                               first[c].size() * sizeof(TypeParam)))
          << "way " << c << ", run " << run;
    }
  }
}

// Launches that follow one another overlap: each must still see what the one before it has written.
TYPED_TEST(DepthAggregationStepOf, ChainInAGraph) {
  constexpr int kLayers = 8;
  constexpr int64_t kDim = 1024;
  StepProblem<TypeParam> p({2, kDim, 4, 1, 64, 1});
  Matrices<TypeParam> states;
  for (int i = 0; i <= kLayers; ++i) {
    states.push_back(std::make_unique<Matrix<TypeParam>>(2, kDim, kDim, 0));
    states.back()->fill(7);
  }
  const auto launch_all = [&](cudaStream_t stream, bool wait) {
    for (int i = 0; i < kLayers; ++i) {
      p.x_pointers.back() = states[i]->data();
      p.x_strides.back() = kDim;
      p.y_pointers[0] = states[i + 1]->data();
      CUDA_OK(launch_aggregation_step(p.args(), stream));
      if (wait) CUDA_OK(cudaStreamSynchronize(stream));
    }
  };
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_OK(cudaDeviceSynchronize());
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  ASSERT_NO_FATAL_FAILURE(launch_all(stream, true));
  states[kLayers]->download();
  const std::vector<TypeParam> expected = states[kLayers]->host();
  const auto clear = [&] {
    for (int i = 1; i <= kLayers; ++i)
      CUDA_OK(cudaMemsetAsync(states[i]->data(), 0xff, 2 * kDim * sizeof(TypeParam), stream));
  };
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_NO_FATAL_FAILURE(clear());
  ASSERT_NO_FATAL_FAILURE(launch_all(stream, false));
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  for (int run = 0; run < 50; ++run) {
    CUDA_OK(cudaGraphLaunch(executable, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    states[kLayers]->download();
    ASSERT_EQ(0, std::memcmp(expected.data(), states[kLayers]->host().data(),
                             expected.size() * sizeof(TypeParam)))
        << "run " << run;
  }
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaStreamDestroy(stream));
}

TYPED_TEST(DepthAggregationStepOf, WhatItDoesNotTake) {
  constexpr int kVectorWidth = 16 / sizeof(TypeParam);
  StepProblem<TypeParam> p({2, 64, 3, 2, 8});
  const AggregationStep good = p.args();
  const auto refused = [&](auto change) {
    AggregationStep args = good;
    change(args);
    EXPECT_EQ(cudaErrorNotSupported, launch_aggregation_step(args, nullptr));
  };
  refused([](AggregationStep& a) { a.dtype = DType::Float64; });
  refused([](AggregationStep& a) { a.tokens = kMaxStepTokens + 1; });
  refused([](AggregationStep& a) { a.sources = kMaxStepSources + 1; });
  refused([](AggregationStep& a) { a.ways = kMaxStepWays + 1; });
  refused([](AggregationStep& a) { a.hidden = 6; });
  refused([](AggregationStep& a) { a.dim -= kVectorWidth / 2; });
  refused([](AggregationStep& a) { a.w1 = static_cast<const TypeParam*>(a.w1) + 1; });
  p.x_strides[1] += 1;
  EXPECT_EQ(cudaErrorNotSupported, launch_aggregation_step(good, nullptr));
  AggregationStep none = good;
  none.tokens = 0;
  EXPECT_EQ(cudaSuccess, launch_aggregation_step(none, nullptr));
  none.tokens = -1;
  EXPECT_EQ(cudaErrorInvalidValue, launch_aggregation_step(none, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
