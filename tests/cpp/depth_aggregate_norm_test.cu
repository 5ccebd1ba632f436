// The launchers of csrc/kernels/depth_aggregate_norm against a float64 reference on the CPU,
// without torch.
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "depth_aggregate_norm/depth_aggregate_norm.h"
#include "kernels_problem.cuh"

namespace muddformer::kernels {
namespace {

struct NormShape {
  Shape shape;
  Norm norm = Norm::RMS;
  int normed = 3;  // ways 0 .. normed - 1 have a norm
  bool bias = false;
  bool add = false;   // the last source is added to every way
  bool pre = false;   // the last source has a pre weight
  bool post = false;  // the last way has a post weight
  bool wide = true;
  bool small = false;  // some norm weights are 0 or tiny
};

constexpr float kEps = 1e-5f;

// A problem with the norms' parameters. P is the type of norm weights.
template <typename T, typename P>
struct NormProblem : Problem<T> {
  explicit NormProblem(const NormShape& s)
      : Problem<T>(s.shape),
        form(s),
        normed(row()),
        mix(row()),
        statistics(2 * (s.shape.ways + 1), s.shape.tokens, s.shape.tokens, 0) {
    const auto weights = [&](Matrices<P>& to, bool used, uint64_t seed, double shift, double size) {
      to.push_back(std::make_unique<Matrix<P>>(1, s.shape.dim, s.shape.dim, 0));
      to.back()->fill(seed, shift, size, s.small ? 5 : 0);
      return used ? to.back()->data() : nullptr;
    };
    for (int c = 0; c < s.shape.ways; ++c) {
      const bool post = s.post && c == s.shape.ways - 1;
      const bool normed = c < s.normed && !post;
      weight_pointers.push_back(weights(gamma, normed, 300 + c, 1.0, 0.5));
      bias_pointers.push_back(weights(beta, normed && s.bias, 400 + c, 0.0, 0.5));
      weight_grad_pointers.push_back(weights(gamma_grad, true, 1, 0, 0));
      bias_grad_pointers.push_back(weights(beta_grad, true, 1, 0, 0));
    }
    for (int c = 0; c < s.shape.ways; ++c) {
      dv.push_back(std::make_unique<Matrix<T>>(s.shape.tokens, s.shape.dim, s.shape.dim, 0));
      dv_pointers.push_back(s.shape.deferred > 0 ? dv.back()->data() : nullptr);
    }
    pre_pointer = weights(gamma, s.pre, 600, 1.0, 0.25);
    pre_grad_pointer = weights(gamma_grad, true, 1, 0, 0);
    post_pointer = weights(gamma, s.post, 500, 0.1, 0.05);
    post_grad_pointer = weights(gamma_grad, true, 1, 0, 0);
    saved_pointers.assign(this->y_pointers.begin(), this->y_pointers.end());
  }
  ~NormProblem() { cudaFree(workspace); }

  Matrix<T> row() const {
    const Shape& s = form.shape;
    return Matrix<T>(s.tokens, s.dim, s.dim, 0);
  }

  template <typename Args>
  void set_norms(Args& args) const {
    args.norm = form.norm;
    args.wide = form.wide;
    args.norm_weight = weight_pointers.data();
    args.norm_bias = bias_pointers.data();
    args.add_newest = form.add;
    args.pre_weight = pre_pointer;
    args.post_weight = post_pointer;
    args.mix = form.post ? mix.data() : nullptr;
    args.statistics = statistics.data();
  }
  AggregateNormForward norm_forward() const {
    AggregateNormForward args{};
    static_cast<AggregateForward&>(args) = this->forward(Path::Automatic);
    set_norms(args);
    args.normed = form.pre ? normed.data() : nullptr;
    args.eps = kEps;
    return args;
  }
  AggregateNormBackward norm_backward() {
    AggregateNormBackward args{};
    static_cast<AggregateBackward&>(args) = this->backward(Path::Automatic);
    set_norms(args);
    args.y = saved_pointers.data();
    args.dv = dv_pointers.data();
    args.norm_weight_grad = weight_grad_pointers.data();
    args.norm_bias_grad = bias_grad_pointers.data();
    args.pre_weight_grad = pre_grad_pointer;
    args.post_weight_grad = post_grad_pointer;
    int64_t floats = 0;
    EXPECT_EQ(cudaSuccess, aggregate_norm_workspace(args, &floats));
    if (workspace == nullptr) {
      EXPECT_EQ(cudaSuccess, cudaMalloc(&workspace, floats * sizeof(float) + 16));
    }
    args.workspace = workspace;
    return args;
  }

  NormShape form;
  Matrix<T> normed, mix;
  Matrix<float> statistics;
  Matrices<P> gamma, beta, gamma_grad, beta_grad;
  std::vector<const void*> weight_pointers, bias_pointers, saved_pointers;
  Matrices<T> dv;
  std::vector<void*> weight_grad_pointers, bias_grad_pointers, dv_pointers;
  void* pre_pointer = nullptr;
  void* pre_grad_pointer = nullptr;
  void* post_pointer = nullptr;
  void* post_grad_pointer = nullptr;
  float* workspace = nullptr;
};

// The largest error of a tensor, and its largest entry.
struct Errors {
  double error = 0;
  double largest = 1e-30;

  void add(double actual, double exact) {
    const double e = std::abs(actual - exact);
    error = e <= error ? error : e;  // keeps a NaN
    largest = std::max(largest, std::abs(exact));
  }
  void expect_below(double bound, const std::string& what) const {
    EXPECT_LE(error / largest, bound) << what;
  }
};

template <typename T, typename P>
void check_norm(const NormShape& s) {
  const Shape& shape = s.shape;
  NormProblem<T, P> p(s);
  CUDA_OK(launch_aggregate_norm_forward(p.norm_forward(), nullptr));
  CUDA_OK(launch_aggregate_norm_backward(p.norm_backward(), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  for (auto& y : p.y) y->download();
  for (auto& g : p.grad_out) g->download();
  for (auto& g : p.gamma_grad) g->download();
  for (auto& g : p.beta_grad) g->download();
  for (auto& d : p.dv) d->download();
  p.dw.download();
  p.normed.download();
  const double rounding = std::is_same_v<T, float> ? 2e-6 : kRounding<T>;
  std::vector<Errors> y_errors(shape.ways), x_errors(shape.sources);
  Errors dw_errors, normed_errors, dv_errors;
  std::vector<double> weight_grad(shape.ways * shape.dim), bias_grad(shape.ways * shape.dim);
  std::vector<double> pre_grad(shape.dim);
  const Matrix<P>& pre_weight = *p.gamma[shape.ways];
  const int newest = shape.sources - 1;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    std::vector<double> dv(shape.ways * shape.dim), base_grad(shape.dim), n(shape.dim);
    double newest_square = 0;
    for (int64_t i = 0; i < shape.dim; ++i) {
      newest_square += p.x[newest]->at(t, i) * p.x[newest]->at(t, i) / shape.dim;
    }
    const double newest_r = 1 / std::sqrt(newest_square + kEps);
    for (int64_t i = 0; s.pre && i < shape.dim; ++i) {
      n[i] = p.x[newest]->at(t, i) * newest_r;
      normed_errors.add(p.normed.at(t, i), n[i] * pre_weight.at(0, i));
    }
    // A source as it is mixed: the normed one as it was rounded.
    const auto source = [&](int j, int64_t i) {
      return s.pre && j == newest ? p.normed.at(t, i) : p.x[j]->at(t, i);
    };
    for (int c = 0; c < shape.ways; ++c) {
      const bool post = s.post && c == shape.ways - 1;
      const bool normed = p.weight_pointers[c] != nullptr || post;
      const Matrix<P>& weight = post ? *p.gamma.back() : *p.gamma[c];
      std::vector<double> v(shape.dim);
      double mean = 0, square = 0;
      for (int64_t i = 0; i < shape.dim; ++i) {
        for (int j = 0; j < shape.sources; ++j) v[i] += p.weight(t, c, j) * source(j, i);
        if (s.add && !post) v[i] += p.x[newest]->at(t, i);
        mean += v[i] / shape.dim;
      }
      if (s.norm == Norm::RMS || post || !normed) mean = 0;
      for (double& value : v) square += (value - mean) * (value - mean) / shape.dim;
      const double r = normed ? 1 / std::sqrt(square + kEps) : 1;
      double along = 0, total = 0;
      for (int64_t i = 0; i < shape.dim; ++i) {
        v[i] = (v[i] - mean) * r;
        const double w = normed ? weight.at(0, i) : 1;
        const double b = p.bias_pointers[c] != nullptr ? p.beta[c]->at(0, i) : 0;
        const double y = v[i] * w + b + (post ? p.x[newest]->at(t, i) : 0);
        y_errors[c].add(p.y[c]->at(t, i), y);
        const double dy = p.dy_pointers[c] != nullptr ? p.dy[c]->at(t, i) : 0;
        weight_grad[c * shape.dim + i] += dy * v[i];
        bias_grad[c * shape.dim + i] += dy;
        along += dy * w * v[i] / shape.dim;
        total += dy * w / shape.dim;
      }
      if (s.norm == Norm::RMS || post) total = 0;
      for (int64_t i = 0; i < shape.dim; ++i) {
        const double dy = p.dy_pointers[c] != nullptr ? p.dy[c]->at(t, i) : 0;
        double& d = dv[c * shape.dim + i];
        d = normed ? r * (dy * weight.at(0, i) - v[i] * along - total) : dy;
        base_grad[i] += post ? dy : d;
        if (normed && shape.deferred > 0) dv_errors.add(p.dv[c]->at(t, i), d);
      }
    }
    for (int j = 0; j < shape.sources; ++j) {
      std::vector<double> dx(shape.dim);
      for (int64_t i = 0; i < shape.dim; ++i) {
        dx[i] = p.grad_in_pointers[j] != nullptr ? p.grad_in[j]->at(t, i) : 0;
        for (int c = 0; c < shape.ways; ++c) dx[i] += p.weight(t, c, j) * dv[c * shape.dim + i];
      }
      if (s.pre && j == newest) {
        double along = 0;
        for (int64_t i = 0; i < shape.dim; ++i) {
          pre_grad[i] += dx[i] * n[i];
          dx[i] *= pre_weight.at(0, i);
          along += dx[i] * n[i] / shape.dim;
        }
        for (int64_t i = 0; i < shape.dim; ++i) dx[i] = newest_r * (dx[i] - n[i] * along);
      }
      for (int64_t i = 0; i < shape.dim && p.grad_out_pointers[j] != nullptr; ++i) {
        const double base = s.add && j == newest ? base_grad[i] : 0;
        x_errors[j].add(p.grad_out[j]->at(t, i), dx[i] + base);
      }
      for (int c = 0; c < shape.ways; ++c) {
        double sum = 0;
        double magnitude = 0;
        for (int64_t i = 0; i < shape.dim; ++i) {
          const double term = dv[c * shape.dim + i] * source(j, i);
          sum += term;
          magnitude += std::abs(term);
        }
        dw_errors.add(p.dw.at(t, c * shape.sources + j), sum);
        // A gradient that has passed a norm is orthogonal to what was normed: sums may cancel.
        dw_errors.largest = std::max(dw_errors.largest, magnitude / 8);
      }
    }
  }
  for (int c = 0; c < shape.ways; ++c) {
    const std::string way = "way " + std::to_string(c);
    y_errors[c].expect_below(2 * rounding, "Y of " + way);
    const bool post = s.post && c == shape.ways - 1;
    Errors weight_errors, bias_errors;
    for (int64_t i = 0; i < shape.dim; ++i) {
      const Matrix<P>& grad = post ? *p.gamma_grad.back() : *p.gamma_grad[c];
      if (p.weight_pointers[c] != nullptr || post) {
        weight_errors.add(grad.at(0, i), weight_grad[c * shape.dim + i]);
      }
      if (p.bias_pointers[c] != nullptr) {
        bias_errors.add(p.beta_grad[c]->at(0, i), bias_grad[c * shape.dim + i]);
      }
    }
    weight_errors.expect_below(8 * rounding, "gradient of the norm weight of " + way);
    bias_errors.expect_below(2 * rounding + 1e-6, "gradient of the bias of " + way);
  }
  for (int j = 0; j < shape.sources; ++j) {
    x_errors[j].expect_below(6 * rounding, "dX of source " + std::to_string(j));
  }
  dv_errors.expect_below(6 * rounding, "dV");
  dw_errors.expect_below(6 * rounding, "dw");
  normed_errors.expect_below(2 * rounding, "the newest source, normed");
  Errors pre_errors;
  for (int64_t i = 0; s.pre && i < shape.dim; ++i) {
    pre_errors.add(p.gamma_grad[shape.ways]->at(0, i), pre_grad[i]);
  }
  pre_errors.expect_below(8 * rounding, "gradient of the pre weight");
}

template <typename T>
class NormKernelsOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    int major = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
    if (major < 9) GTEST_SKIP() << "these kernels need compute capability 9.0";
  }
  // Every kind of norm on a shape.
  void check(const Shape& shape) {
    for (const Norm norm : {Norm::RMS, Norm::Layer}) {
      for (const bool add : {false, true}) {
        for (const bool narrow : {false, true}) {
          NormShape s{shape, norm};
          s.normed = narrow ? shape.ways : std::max(1, shape.ways - 1);
          s.bias = norm == Norm::Layer;
          s.add = add;
          s.pre = add != narrow;
          s.post = add && !narrow;
          s.wide = !narrow;
          s.small = narrow;
          SCOPED_TRACE(testing::PrintToString(shape) + (s.bias ? ", LayerNorm" : ", RMSNorm") +
                       (add ? ", added" : "") + (s.pre ? ", pre" : "") + (s.post ? ", post" : "") +
                       (narrow ? ", narrow and small weights" : ""));
          if (narrow) {
            ASSERT_NO_FATAL_FAILURE((check_norm<T, T>(s)));
          } else {
            ASSERT_NO_FATAL_FAILURE((check_norm<T, float>(s)));
          }
        }
      }
    }
  }
};

using FastTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(NormKernelsOf, FastTypes);

TYPED_TEST(NormKernelsOf, EveryWidth) {
  for (const int64_t dim : {8, 64, 256, 384, 1000, 1024, 2048, 2056, 2560, 4096, 4104}) {
    ASSERT_NO_FATAL_FAILURE(this->check({7, dim, 5, 4}));
  }
}

TYPED_TEST(NormKernelsOf, EveryNumberOfSourcesAndWays) {
  for (const int ways : {1, 2, 3, 4}) {
    for (const int sources : {1, 2, 4, 9, 33, 64}) {
      ASSERT_NO_FATAL_FAILURE(this->check({5, 256, sources, ways}));
    }
  }
}

// Blocks of the backward serve several tokens.
TYPED_TEST(NormKernelsOf, ManyTokens) {
  ASSERT_NO_FATAL_FAILURE(this->check({1500, 64, 3, 4}));
  ASSERT_NO_FATAL_FAILURE(this->check({1100, 264, 9, 3}));
  ASSERT_NO_FATAL_FAILURE(this->check({400, 2560, 3, 2}));
  ASSERT_NO_FATAL_FAILURE(this->check({400, 4608, 3, 2}));  // more than one chunk
}

TYPED_TEST(NormKernelsOf, StridesPriorAndHoles) {
  for (const int ways : {1, 2, 4}) {
    for (const int64_t dim : {2560, 4608}) {
      ASSERT_NO_FATAL_FAILURE(this->check({6, dim, 11, ways, 16, 0, true, true}));
    }
  }
}

TYPED_TEST(NormKernelsOf, DeferredSources) {
  for (const int deferred : {1, 2, 5, 12}) {
    for (const int64_t dim : {8, 248, 512, 2560, 4608}) {
      ASSERT_NO_FATAL_FAILURE(this->check({6, dim, 12, 4, 8, 0, false, false, deferred}));
    }
  }
  for (const int ways : {1, 2, 3}) {
    ASSERT_NO_FATAL_FAILURE(this->check({300, 264, 9, ways, 0, 0, true, true, 7}));
  }
}

// n is made again for some columns of the other ways, and not of the post way.
TYPED_TEST(NormKernelsOf, SmallWeightsBesidePost) {
  for (const Norm norm : {Norm::RMS, Norm::Layer}) {
    for (const int64_t dim : {264, 2560, 4608}) {
      NormShape s{{9, dim, 5, 4}, norm};
      s.bias = norm == Norm::Layer;
      s.add = s.pre = s.post = s.small = true;
      ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
      s.wide = false;
      ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, TypeParam>(s)));
    }
  }
}

TYPED_TEST(NormKernelsOf, NothingNormed) {
  for (const bool pre : {false, true}) {
    for (const int64_t dim : {264, 4608}) {
      NormShape s{{5, dim, 4, 3, 0, 0, false, true}};
      s.normed = 0;
      s.add = s.pre = pre;
      ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
    }
  }
}

TYPED_TEST(NormKernelsOf, BiasesOfRMSNorm) {
  for (const int64_t dim : {264, 4608}) {
    NormShape s{{5, dim, 4, 3}};
    s.bias = s.pre = true;
    ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
  }
}

// Rows for which smaller chunks save shared memory.
TYPED_TEST(NormKernelsOf, WideRows) {
  NormShape s{{3, 10240, 3, 4}};
  ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
  s = NormShape{{3, 6152, 3, 3}};
  s.add = s.pre = s.post = true;
  ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
  s = NormShape{{3, 5120, 3, 4}, Norm::Layer};
  s.normed = 4;
  s.bias = s.add = s.pre = true;
  ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
  s = NormShape{{3, 6408, 3, 2}, Norm::Layer};
  s.bias = s.add = s.pre = s.post = true;
  ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
  // As wide as the forward takes it.
  s = NormShape{{2, 4096 * 16 / sizeof(TypeParam), 3, 1}};
  ASSERT_NO_FATAL_FAILURE((check_norm<TypeParam, float>(s)));
}

TYPED_TEST(NormKernelsOf, RepeatsBitForBit) {
  for (const int64_t dim : {512, 2560, 4608}) {
    NormShape s{{600, dim, 3, 4}, Norm::Layer};
    s.bias = s.add = s.pre = s.post = true;
    NormProblem<TypeParam, float> p(s);
    std::vector<std::vector<float>> weight_grads;
    std::vector<std::vector<TypeParam>> streams, newest_grads;
    for (int run = 0; run < 50; ++run) {
      CUDA_OK(launch_aggregate_norm_forward(p.norm_forward(), nullptr));
      CUDA_OK(launch_aggregate_norm_backward(p.norm_backward(), nullptr));
      CUDA_OK(cudaDeviceSynchronize());
      p.y[0]->download();
      p.gamma_grad[1]->download();
      p.grad_out.back()->download();
      streams.push_back(p.y[0]->host());
      weight_grads.push_back(p.gamma_grad[1]->host());
      newest_grads.push_back(p.grad_out.back()->host());
      const size_t bytes = newest_grads[0].size() * sizeof(TypeParam);
      ASSERT_EQ(0, std::memcmp(streams[0].data(), streams[run].data(), bytes)) << run;
      ASSERT_EQ(0, std::memcmp(newest_grads[0].data(), newest_grads[run].data(), bytes)) << run;
      ASSERT_EQ(0, std::memcmp(weight_grads[0].data(), weight_grads[run].data(),
                               weight_grads[0].size() * sizeof(float)))
          << run;
    }
  }
}

TYPED_TEST(NormKernelsOf, RefusesWhatItCannotDo) {
  NormShape s{{4, 64, 3, 2}};
  NormProblem<TypeParam, float> p(s);
  AggregateNormForward args = p.norm_forward();
  args.dtype = DType::Float64;
  EXPECT_EQ(cudaErrorNotSupported, launch_aggregate_norm_forward(args, nullptr));
  args = p.norm_forward();
  args.dim = 63;
  EXPECT_EQ(cudaErrorNotSupported, launch_aggregate_norm_forward(args, nullptr));
  args = p.norm_forward();
  args.dim = 4097 * 16 / sizeof(TypeParam);
  EXPECT_EQ(cudaErrorNotSupported, launch_aggregate_norm_forward(args, nullptr));
  args = p.norm_forward();
  args.post_weight = p.gamma.back()->data();
  EXPECT_EQ(cudaErrorInvalidValue, launch_aggregate_norm_forward(args, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
