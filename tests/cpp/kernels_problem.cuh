// A problem for the launchers of csrc/kernels: tensors on the device, surrounded by poison, and the
// check of forward and backward against float64 on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <ostream>
#include <type_traits>
#include <vector>

#include "depth_aggregate/depth_aggregate.h"

namespace muddformer::kernels {

#define CUDA_OK(call) ASSERT_EQ(cudaSuccess, (call))

template <typename T>
constexpr DType kDType = std::is_same_v<T, float>    ? DType::Float32
                         : std::is_same_v<T, double> ? DType::Float64
                         : std::is_same_v<T, __half> ? DType::Float16
                                                     : DType::BFloat16;

// Half the distance from 1 to the next number.
template <typename T>
constexpr double kRounding = std::is_same_v<T, float>    ? 0x1p-24
                             : std::is_same_v<T, double> ? 0x1p-53
                             : std::is_same_v<T, __half> ? 0x1p-11
                                                         : 0x1p-8;

// What sums in float32 (float64) may lose, relative to the sum of magnitudes.
template <typename T>
constexpr double kSumError = std::is_same_v<T, double> ? 1e-14 : 2e-6;

template <typename T>
T make(double value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

template <typename T>
double value_of(T number) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(number);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(number);
  } else {
    return number;
  }
}

// A pseudo-random number in [-1, 1) that depends on nothing but its arguments.
__host__ __device__ inline double noise(uint64_t tensor, uint64_t index) {
  uint64_t z = (tensor << 40) + index + 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return static_cast<double>(z >> 40) / static_cast<double>(1 << 23) - 1.0;
}

// rows x dim elements on the device, with a row stride, an offset from the aligned start, and
// poison (NaN) all around.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t dim, int64_t stride, int64_t offset)
      : rows_(rows),
        dim_(dim),
        stride_(stride),
        offset_(offset),
        host_(offset + rows * stride + kMargin) {
    std::memset(static_cast<void*>(host_.data()), 0xff, bytes());
    EXPECT_EQ(cudaSuccess, cudaMalloc(&device_, bytes()));
    upload();
  }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  ~Matrix() { cudaFree(device_); }

  // shift + size * noise; every zeros-th entry is 0 or tiny.
  void fill(uint64_t tensor, double shift = 0, double size = 1, int zeros = 0) {
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t i = 0; i < dim_; ++i) {
        double value = shift + size * noise(tensor, row * dim_ + i);
        if (zeros != 0 && i % zeros == 0) value *= i % 2 == 0 ? 0.0 : 1e-4;
        host_[offset_ + row * stride_ + i] = make<T>(value);
      }
    }
    upload();
  }
  void download() {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost));
  }
  double at(int64_t row, int64_t i) const { return value_of(host_[offset_ + row * stride_ + i]); }
  bool margin_is_poison() const {
    const auto* tail =
        reinterpret_cast<const unsigned char*>(host_.data() + host_.size() - kMargin);
    return std::all_of(tail, tail + kMargin * sizeof(T),
                       [](unsigned char byte) { return byte == 0xff; });
  }
  T* data() const { return device_ + offset_; }
  int64_t stride() const { return stride_; }
  const std::vector<T>& host() const { return host_; }

 private:
  static constexpr int64_t kMargin = 64;

  size_t bytes() const { return host_.size() * sizeof(T); }
  void upload() {
    EXPECT_EQ(cudaSuccess, cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice));
  }

  int64_t rows_, dim_, stride_, offset_;
  std::vector<T> host_;
  T* device_ = nullptr;
};

template <typename T>
using Matrices = std::vector<std::unique_ptr<Matrix<T>>>;

struct Shape {
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
  int64_t gap = 0;         // elements between the rows of X_j, more for every other source
  int64_t offset = 0;      // elements from the aligned start, of everything
  bool one_prior = false;  // w has stride 0
  bool holes = false;      // some of dY, G and dX are missing
  int deferred = 0;        // sources without G and dX
};

inline void PrintTo(const Shape& s, std::ostream* os) {
  *os << s.tokens << " x " << s.dim << ", S " << s.sources << ", C " << s.ways << ", gap " << s.gap
      << ", offset " << s.offset << (s.one_prior ? ", one prior" : "") << (s.holes ? ", holes" : "")
      << ", deferred " << s.deferred;
}

template <typename T>
struct Problem {
  explicit Problem(const Shape& s)
      : shape(s),
        w(s.one_prior ? 1 : s.tokens, s.ways * s.sources, s.ways * s.sources, s.offset),
        dw(s.tokens, s.ways * s.sources, s.ways * s.sources, s.offset) {
    w.fill(1);
    for (int j = 0; j < s.sources; ++j) {
      x.push_back(
          std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim + s.gap * (1 + j % 2), s.offset));
      x.back()->fill(100 + j);
      grad_in.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, s.offset));
      grad_in.back()->fill(2000 + j);
      grad_out.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, s.offset));
      x_pointers.push_back(x.back()->data());
      x_strides.push_back(x.back()->stride());
      const bool deferred = j < s.deferred;
      grad_in_pointers.push_back(deferred || (s.holes && j % 3 == 1) ? nullptr
                                                                     : grad_in.back()->data());
      grad_out_pointers.push_back(deferred || (s.holes && j % 5 == 2) ? nullptr
                                                                      : grad_out.back()->data());
    }
    for (int c = 0; c < s.ways; ++c) {
      y.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, s.offset));
      dy.push_back(std::make_unique<Matrix<T>>(s.tokens, s.dim, s.dim, s.offset));
      dy.back()->fill(10 + c);
      y_pointers.push_back(y.back()->data());
      dy_pointers.push_back(s.holes && c == s.ways / 2 ? nullptr : dy.back()->data());
    }
  }

  AggregateForward forward(Path path) const {
    return {kDType<T>,         shape.tokens, shape.dim,
            shape.sources,     shape.ways,   x_pointers.data(),
            x_strides.data(),  w.data(),     w_stride(),
            y_pointers.data(), path};
  }
  AggregateBackward backward(Path path) const {
    return {kDType<T>,
            shape.tokens,
            shape.dim,
            shape.sources,
            shape.ways,
            x_pointers.data(),
            x_strides.data(),
            w.data(),
            w_stride(),
            dy_pointers.data(),
            grad_in_pointers.data(),
            grad_out_pointers.data(),
            dw.data(),
            path};
  }
  int64_t w_stride() const { return shape.one_prior ? 0 : shape.ways * shape.sources; }
  double weight(int64_t t, int c, int j) const {
    return w.at(shape.one_prior ? 0 : t, c * shape.sources + j);
  }

  Shape shape;
  Matrix<T> w, dw;
  Matrices<T> x, y, dy, grad_in, grad_out;
  std::vector<const void*> x_pointers, dy_pointers, grad_in_pointers;
  std::vector<void*> y_pointers, grad_out_pointers;
  std::vector<int64_t> x_strides;
};

// One rounding of the exact value, and what the sum may have lost. The smallest numbers of float16
// are 2^-24 apart.
template <typename T>
void expect_near(double actual, double exact, double magnitude, const char* what, int64_t t,
                 int64_t i) {
  const double bound = 1.01 * kRounding<T> * std::abs(exact) + kSumError<T> * magnitude + 0x1p-25;
  ASSERT_LE(std::abs(actual - exact), bound)
      << what << " of token " << t << ", index " << i << ": " << actual << " instead of " << exact;
}

template <typename T>
void check_forward(const Shape& shape, Path path) {
  Problem<T> p(shape);
  CUDA_OK(launch_aggregate_forward(p.forward(path), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  for (int c = 0; c < shape.ways; ++c) {
    p.y[c]->download();
    ASSERT_TRUE(p.y[c]->margin_is_poison());
    for (int64_t t = 0; t < shape.tokens; ++t) {
      for (int64_t i = 0; i < shape.dim; ++i) {
        double sum = 0;
        double magnitude = 0;
        for (int j = 0; j < shape.sources; ++j) {
          const double term = p.weight(t, c, j) * p.x[j]->at(t, i);
          sum += term;
          magnitude += std::abs(term);
        }
        ASSERT_NO_FATAL_FAILURE(expect_near<T>(p.y[c]->at(t, i), sum, magnitude, "Y", t, i))
            << "way " << c;
      }
    }
  }
}

template <typename T>
void check_backward(const Shape& shape, Path path) {
  Problem<T> p(shape);
  CUDA_OK(launch_aggregate_backward(p.backward(path), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  p.dw.download();
  ASSERT_TRUE(p.dw.margin_is_poison());
  for (int j = 0; j < shape.sources; ++j) {
    p.grad_out[j]->download();
    ASSERT_TRUE(p.grad_out[j]->margin_is_poison());
    for (int64_t t = 0; t < shape.tokens; ++t) {
      for (int64_t i = 0; i < shape.dim && p.grad_out_pointers[j] != nullptr; ++i) {
        double sum = p.grad_in_pointers[j] != nullptr ? p.grad_in[j]->at(t, i) : 0;
        double magnitude = std::abs(sum);
        for (int c = 0; c < shape.ways; ++c) {
          const double term =
              p.dy_pointers[c] != nullptr ? p.weight(t, c, j) * p.dy[c]->at(t, i) : 0;
          sum += term;
          magnitude += std::abs(term);
        }
        ASSERT_NO_FATAL_FAILURE(expect_near<T>(p.grad_out[j]->at(t, i), sum, magnitude, "dX", t, i))
            << "source " << j;
      }
      for (int c = 0; c < shape.ways; ++c) {
        double sum = 0;
        double magnitude = 0;
        for (int64_t i = 0; i < shape.dim && p.dy_pointers[c] != nullptr; ++i) {
          const double term = p.dy[c]->at(t, i) * p.x[j]->at(t, i);
          sum += term;
          magnitude += std::abs(term);
        }
        const int64_t index = c * shape.sources + j;
        ASSERT_NO_FATAL_FAILURE(expect_near<T>(p.dw.at(t, index), sum, magnitude, "dw", t, index));
      }
    }
  }
}

}  // namespace muddformer::kernels
