// A problem for the launchers of csrc/kernels/connection_weights: tensors on the device, and the
// checks of every step against float64 on the CPU. Each step is checked from the inputs that the
// kernels themselves have made for it, so that bounds are one rounding and what sums in float32 may
// lose.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <ostream>
#include <vector>

#include "connection_weights/connection_weights.h"
#include "kernels_problem.cuh"

namespace muddformer::kernels {

// A matrix on the device with poison (NaN) after it, and its copy on the host.
template <typename T>
class Array {
 public:
  Array(int64_t rows, int64_t columns) : columns_(columns), host_(rows * columns + kMargin) {
    std::memset(static_cast<void*>(host_.data()), 0xff, bytes());
    EXPECT_EQ(cudaSuccess, cudaMalloc(&device_, bytes()));
    upload();
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(device_); }

  Array& fill(uint64_t seed, double scale = 1) {
    for (size_t i = 0; i + kMargin < host_.size(); ++i) host_[i] = make<T>(scale * noise(seed, i));
    upload();
    return *this;
  }
  void download() {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost));
    const auto* tail = reinterpret_cast<const unsigned char*>(host_.data() + host_.size()) - 1;
    for (size_t i = 0; i < kMargin * sizeof(T); ++i) ASSERT_EQ(0xff, tail[-static_cast<int>(i)]);
  }
  double at(int64_t row, int64_t column = 0) const {
    return value_of(host_[row * columns_ + column]);
  }
  T* data() const { return device_; }
  const std::vector<T>& host() const { return host_; }

 private:
  static constexpr size_t kMargin = 64;

  size_t bytes() const { return host_.size() * sizeof(T); }
  void upload() {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice));
  }

  int64_t columns_;
  std::vector<T> host_;
  T* device_ = nullptr;
};

struct WeightsCase {
  int64_t tokens;
  int64_t dim;
  int hidden;
  int outputs;
  bool tanh = false;
  double cap = 0;
  bool scale = false;
  bool incoming = true;  // grad_x
};

inline void PrintTo(const WeightsCase& c, std::ostream* os) {
  *os << c.tokens << " x " << c.dim << ", K " << c.hidden << ", C*S " << c.outputs
      << (c.tanh ? ", tanh" : "") << (c.cap > 0 ? ", cap" : "") << (c.scale ? ", scale" : "")
      << (c.incoming ? "" : ", no incoming gradient");
}

inline constexpr double kEps = 1e-3;

template <typename T>
struct WeightsProblem {
  explicit WeightsProblem(const WeightsCase& which)
      : c(which),
        x(c.tokens, c.dim),
        grad_x(c.tokens, c.dim),
        dx(c.tokens, c.dim),
        w1(c.hidden, c.dim),
        dw1(c.hidden, c.dim),
        w2(c.outputs, c.hidden),
        weights(c.tokens, c.outputs),
        grad_weights(c.tokens, c.outputs),
        hidden(c.tokens, c.hidden),
        e(c.tokens, c.hidden),
        dw2(c.outputs, c.hidden),
        prior(1, c.outputs),
        scale(1, c.dim),
        dprior(1, c.outputs),
        dscale(1, c.dim),
        factor(c.tokens, 1),
        coefficient(hidden_slabs(c.hidden), c.tokens),
        scale_partials(reduce_rows(c.hidden), c.dim) {
    shape = {kDType<T>, c.tokens, c.dim, c.hidden, c.outputs, c.tanh, static_cast<float>(c.cap)};
    EXPECT_EQ(cudaSuccess, input_backward_splits(shape, splits));
    EXPECT_EQ(cudaSuccess, hidden_backward_groups(c.tokens, groups));
    w1_partials = std::make_unique<Array<float>>(int64_t{splits} * c.hidden, c.dim);
    w2_partials = std::make_unique<Array<float>>(groups * c.outputs, c.hidden);
    prior_partials = std::make_unique<Array<float>>(groups, c.outputs);
    x.fill(1, 1.5);
    grad_x.fill(2);
    w1.fill(3, 2 / std::sqrt(c.dim));
    w2.fill(4, 2 / std::sqrt(c.hidden));
    grad_weights.fill(5);
    prior.fill(6);
    scale.fill(7);
  }

  ConnectionWeightsForward forward(int cluster) const {
    return {shape, static_cast<float>(kEps), x.data(),      w1.data(),     w2.data(), prior.data(),
            true,  weights.data(),           hidden.data(), factor.data(), cluster};
  }
  // `plain`: with the kernels for every GPU.
  void launch(cudaStream_t stream, int cluster = 0, bool plain = false) const {
    ConnectionWeightsForward first = forward(cluster);
    first.plain = plain;
    CUDA_OK(launch_connection_weights_forward(first, stream));
    CUDA_OK(launch_connection_weights_hidden_backward(
        {shape, grad_weights.data(), c.cap > 0 ? weights.data() : nullptr, w2.data(), hidden.data(),
         factor.data(), e.data(), coefficient.data(), w2_partials->data(), prior_partials->data()},
        stream));
    CUDA_OK(launch_connection_weights_input_backward(
        {shape, x.data(), c.incoming ? grad_x.data() : nullptr, w1.data(), e.data(),
         coefficient.data(), dx.data(), w1_partials->data(), splits, plain},
        stream));
    CUDA_OK(launch_connection_weights_reduce(
        {shape, w1_partials->data(), splits, dw1.data(), w1.data(),
         c.scale ? scale.data() : nullptr, true, c.scale ? scale_partials.data() : nullptr,
         w2_partials->data(), prior_partials->data(), groups, dw2.data(), dprior.data(), true},
        stream));
    if (c.scale) {
      CUDA_OK(launch_sum_rows(
          {shape.dtype, reduce_rows(c.hidden), c.dim, scale_partials.data(), dscale.data()},
          stream));
    }
  }
  void download() {
    for (Array<T>* a : {&dx, &dw1, &weights, &hidden, &e, &dw2, &dscale}) a->download();
    for (Array<float>* a : {&dprior, &factor, &coefficient}) a->download();
  }
  std::vector<std::vector<unsigned char>> results() {
    download();
    std::vector<std::vector<unsigned char>> all;
    const auto add = [&all](const auto& array) {
      const auto* begin = reinterpret_cast<const unsigned char*>(array.host().data());
      all.emplace_back(begin, begin + array.host().size() * sizeof(array.host()[0]));
    };
    for (const Array<T>* a : {&dx, &dw1, &weights, &hidden, &e, &dw2, &dscale}) add(*a);
    for (const Array<float>* a : {&dprior, &factor, &coefficient}) add(*a);
    return all;
  }

  WeightsCase c;
  ConnectionWeightsShape shape;
  int splits = 0;
  int64_t groups = 0;
  Array<T> x, grad_x, dx, w1, dw1, w2, weights, grad_weights, hidden, e, dw2;
  Array<float> prior, scale, dprior;
  Array<T> dscale;
  Array<float> factor, coefficient, scale_partials;
  std::unique_ptr<Array<float>> w1_partials, w2_partials, prior_partials;
};

// A sum in float64 with the sum of its terms' magnitudes.
struct Accurate {
  double value = 0;
  double magnitude = 0;
  void add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

inline double gelu_of(double h, bool tanh_form) {
  if (!tanh_form) return 0.5 * h * (1 + std::erf(h / std::sqrt(2.0)));
  return 0.5 * h * (1 + std::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h)));
}

inline double gelu_slope(double h, bool tanh_form) {
  const double step = 1e-5;
  return (gelu_of(h + step, tanh_form) - gelu_of(h - step, tanh_form)) / (2 * step);
}

template <typename T>
void expect_close(double actual, double exact, double magnitude, const char* what, int64_t i,
                  int64_t j) {
  const double bound = 1.01 * kRounding<T> * std::abs(exact) + 4e-6 * magnitude + 0x1p-25;
  ASSERT_LE(std::abs(actual - exact), bound)
      << what << '[' << i << ", " << j << "]: " << actual << " instead of " << exact;
}

template <typename T>
void check_forward(const WeightsProblem<T>& p) {
  const WeightsCase& c = p.c;
  for (int64_t t = 0; t < c.tokens; ++t) {
    Accurate squares;
    for (int64_t d = 0; d < c.dim; ++d) squares.add(p.x.at(t, d) * p.x.at(t, d));
    const double r = 1 / std::sqrt(squares.value / c.dim + kEps);
    ASSERT_NO_FATAL_FAILURE(expect_close<float>(p.factor.at(t), r, r, "factor", t, 0));
    for (int k = 0; k < c.hidden; ++k) {
      Accurate h;
      for (int64_t d = 0; d < c.dim; ++d) h.add(r * p.x.at(t, d) * p.w1.at(k, d));
      ASSERT_NO_FATAL_FAILURE(
          expect_close<T>(p.hidden.at(t, k), h.value, h.magnitude, "hidden", t, k));
    }
    for (int j = 0; j < c.outputs; ++j) {
      Accurate a;
      for (int k = 0; k < c.hidden; ++k) a.add(gelu_of(p.hidden.at(t, k), c.tanh) * p.w2.at(j, k));
      const double rounded = 1.01 * kRounding<T> * a.magnitude / 4e-6;  // of GELU(h)
      a.add(p.prior.at(0, j));
      const double value = c.cap > 0 ? c.cap * std::tanh(a.value / c.cap) : a.value;
      ASSERT_NO_FATAL_FAILURE(
          expect_close<T>(p.weights.at(t, j), value, a.magnitude + rounded, "weights", t, j));
    }
  }
}

// dA before it is rounded: without a cap it is of the dtype already.
template <typename T>
double grad_output(const WeightsProblem<T>& p, int64_t t, int j) {
  const double tanh = p.c.cap > 0 ? p.weights.at(t, j) / p.c.cap : 0;
  return p.grad_weights.at(t, j) * (1 - tanh * tanh);
}

// What the rounding of `factors` numbers of each term may do to a sum, as more magnitude.
template <typename T>
double with_rounding(const Accurate& sum, int factors) {
  return sum.magnitude * (1 + factors * 1.01 * kRounding<T> / 4e-6);
}

template <typename T>
void check_dx(const WeightsProblem<T>& p) {
  const WeightsCase& c = p.c;
  for (int64_t t = 0; t < c.tokens; ++t) {
    double coefficient = 0;
    for (int slab = 0; slab < hidden_slabs(c.hidden); ++slab)
      coefficient += p.coefficient.at(slab, t);
    for (int64_t d = 0; d < c.dim; ++d) {
      Accurate dx;
      for (int k = 0; k < c.hidden; ++k) dx.add(p.e.at(t, k) * p.w1.at(k, d));
      dx.add(-p.x.at(t, d) * coefficient);
      if (c.incoming) dx.add(p.grad_x.at(t, d));
      ASSERT_NO_FATAL_FAILURE(expect_close<T>(p.dx.at(t, d), dx.value, dx.magnitude, "dx", t, d));
    }
  }
}

template <typename T>
void check_hidden_backward(const WeightsProblem<T>& p) {
  const WeightsCase& c = p.c;
  const int roundings = c.cap > 0 ? 1 : 0;  // of dA
  std::vector<Accurate> dprior(c.outputs);
  std::vector<Accurate> dw2(static_cast<size_t>(c.outputs) * c.hidden);
  for (int64_t t = 0; t < c.tokens; ++t) {
    const double r = p.factor.at(t);
    std::vector<double> da(c.outputs);
    for (int j = 0; j < c.outputs; ++j) dprior[j].add(da[j] = grad_output(p, t, j));
    Accurate coefficient;
    double all_slabs = 0;
    for (int slab = 0; slab < hidden_slabs(c.hidden); ++slab)
      all_slabs += p.coefficient.at(slab, t);
    for (int k = 0; k < c.hidden; ++k) {
      const double h = p.hidden.at(t, k), slope = gelu_slope(h, c.tanh), gelu = gelu_of(h, c.tanh);
      Accurate dg;
      for (int j = 0; j < c.outputs; ++j) {
        dg.add(da[j] * p.w2.at(j, k));
        dw2[static_cast<size_t>(j) * c.hidden + k].add(da[j] * gelu);
      }
      ASSERT_NO_FATAL_FAILURE(expect_close<T>(p.e.at(t, k), r * slope * dg.value,
                                              1.2 * r * with_rounding<T>(dg, roundings), "e", t,
                                              k));
      coefficient.add(p.e.at(t, k) * h * r / c.dim);
    }
    ASSERT_NO_FATAL_FAILURE(expect_close<float>(all_slabs, coefficient.value, coefficient.magnitude,
                                                "coefficient", t, 0));
  }
  for (int j = 0; j < c.outputs; ++j) {
    ASSERT_NO_FATAL_FAILURE(expect_close<float>(p.dprior.at(0, j), dprior[j].value,
                                                with_rounding<T>(dprior[j], roundings), "dprior", 0,
                                                j));
    for (int k = 0; k < c.hidden; ++k) {
      const Accurate& sum = dw2[static_cast<size_t>(j) * c.hidden + k];
      ASSERT_NO_FATAL_FAILURE(expect_close<T>(p.dw2.at(j, k), sum.value,
                                              with_rounding<T>(sum, 1 + roundings), "dW2", j, k));
    }
  }
}

template <typename T>
void check_w1(const WeightsProblem<T>& p) {
  const WeightsCase& c = p.c;
  for (int64_t d = 0; d < c.dim; ++d) {
    Accurate dscale;
    for (int k = 0; k < c.hidden; ++k) {
      Accurate outer;
      for (int64_t t = 0; t < c.tokens; ++t) outer.add(p.e.at(t, k) * p.x.at(t, d));
      const double scale = c.scale ? p.scale.at(0, d) : 1;
      ASSERT_NO_FATAL_FAILURE(
          expect_close<T>(p.dw1.at(k, d), scale * outer.value, outer.magnitude, "dW1", k, d));
      dscale.add(p.w1.at(k, d) * outer.value);
      dscale.magnitude += std::abs(p.w1.at(k, d)) * outer.magnitude;
    }
    if (c.scale) {
      ASSERT_NO_FATAL_FAILURE(
          expect_close<T>(p.dscale.at(0, d), dscale.value, dscale.magnitude, "dscale", 0, d));
    }
  }
}

}  // namespace muddformer::kernels
