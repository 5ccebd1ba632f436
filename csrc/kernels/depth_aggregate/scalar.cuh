// Depth aggregation without vectors: right for any dtype, width and alignment and up to kMaxWays
// ways, in the formulas of depth_aggregate.h. A block walks over tokens, its threads over the
// columns of a row. Rows and weights that are read again come from the caches.
#pragma once

#include <algorithm>

#include "../common/device.h"
#include "../common/vector.cuh"
#include "../common/warp_sums.cuh"
#include "depth_aggregate.h"

namespace muddformer::kernels {

inline constexpr int kScalarThreads = 256;
inline constexpr int kScalarTable = 64;  // sources of one launch of the backward
inline constexpr int kScalarWays = 4;    // ways whose sums are in registers together

template <typename T>
struct ScalarForwardArgs {
  const T* x[kMaxSources];
  int64_t x_stride[kMaxSources];
  T* y[kMaxWays];
  const T* w;
  int64_t w_stride;
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
};

template <typename T>
__global__ void __launch_bounds__(kScalarThreads)
    forward_scalar(const __grid_constant__ ScalarForwardArgs<T> args) {
  for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    for (int64_t column = threadIdx.x; column < args.dim; column += blockDim.x) {
      for (int first = 0; first < args.ways; first += kScalarWays) {
        const int ways = min(kScalarWays, args.ways - first);
        const T* w = args.w + token * args.w_stride + first * args.sources;
        Sum<T> sums[kScalarWays] = {};
#pragma unroll 4
        for (int j = 0; j < args.sources; ++j) {
          const Sum<T> x = widen(args.x[j][token * args.x_stride[j] + column]);
#pragma unroll
          for (int c = 0; c < kScalarWays; ++c) {
            if (c < ways) sums[c] += widen(w[c * args.sources + j]) * x;
          }
        }
#pragma unroll
        for (int c = 0; c < kScalarWays; ++c) {
          if (c < ways) args.y[first + c][token * args.dim + column] = narrow<T>(sums[c]);
        }
      }
    }
  }
}

template <typename T>
struct ScalarBackwardArgs {
  const T* x[kScalarTable];
  int64_t x_stride[kScalarTable];
  const T* grad_in[kScalarTable];
  T* grad_out[kScalarTable];
  const T* dy[kMaxWays];
  const T* w;
  T* dw;
  int64_t w_stride;
  int64_t way_stride;  // of w and dw
  int64_t tokens;
  int64_t dim;
  int sources;
  int ways;
};

template <typename T>
__global__ void __launch_bounds__(kScalarThreads)
    backward_scalar(const __grid_constant__ ScalarBackwardArgs<T> args) {
  constexpr int kWarps = kScalarThreads / 32;
  __shared__ Sum<T> warp_dots[kWarps][kScalarWays];
  const int lane = threadIdx.x % 32;
  for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    const int64_t row = token * args.dim;
    for (int j = 0; j < args.sources; ++j) {
      const T* x = args.x[j] + token * args.x_stride[j];
      const T* w = args.w + token * args.w_stride + j;
      for (int first = 0; first < args.ways; first += kScalarWays) {
        const int ways = min(kScalarWays, args.ways - first);
        Sum<T> dots[kScalarWays] = {};
        for (int64_t column = threadIdx.x; column < args.dim; column += blockDim.x) {
          const Sum<T> value = widen(x[column]);
#pragma unroll
          for (int c = 0; c < kScalarWays; ++c) {
            if (c < ways && args.dy[first + c] != nullptr) {
              dots[c] += widen(args.dy[first + c][row + column]) * value;
            }
          }
          if (first == 0 && args.grad_out[j] != nullptr) {
            Sum<T> grad =
                args.grad_in[j] != nullptr ? widen(args.grad_in[j][row + column]) : Sum<T>{};
            for (int c = 0; c < args.ways; ++c) {
              if (args.dy[c] != nullptr) {
                grad += widen(w[c * args.way_stride]) * widen(args.dy[c][row + column]);
              }
            }
            args.grad_out[j][row + column] = narrow<T>(grad);
          }
        }
        const int owned = warp_sums<kScalarWays>(dots, lane);
        if (lane % kSharers<kScalarWays> == 0) warp_dots[threadIdx.x / 32][owned] = dots[0];
        __syncthreads();
        if (static_cast<int>(threadIdx.x) < ways) {
          Sum<T> sum{};
          for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) {
            sum += warp_dots[warp][threadIdx.x];
          }
          T* dw = args.dw + token * args.ways * args.way_stride;
          dw[(first + threadIdx.x) * args.way_stride + j] = narrow<T>(sum);
        }
        __syncthreads();
      }
    }
  }
}

inline dim3 scalar_grid(int64_t tokens, const Device& device) {
  return dim3(static_cast<unsigned>(std::min<int64_t>(tokens, device.multiprocessors * 16)));
}

inline dim3 scalar_block(int64_t dim) {
  return dim3(static_cast<unsigned>(std::min<int64_t>((dim + 31) / 32 * 32, kScalarThreads)));
}

template <typename T>
cudaError_t launch_forward_scalar(const AggregateForward& p, const Device& device,
                                  cudaStream_t stream) {
  ScalarForwardArgs<T> args;
  for (int j = 0; j < p.sources; ++j) {
    args.x[j] = static_cast<const T*>(p.x[j]);
    args.x_stride[j] = p.x_stride[j];
  }
  for (int c = 0; c < p.ways; ++c) args.y[c] = static_cast<T*>(p.y[c]);
  args.w = static_cast<const T*>(p.w);
  args.w_stride = p.w_stride;
  args.tokens = p.tokens;
  args.dim = p.dim;
  args.sources = p.sources;
  args.ways = p.ways;
  forward_scalar<<<scalar_grid(p.tokens, device), scalar_block(p.dim), 0, stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_backward_scalar(const AggregateBackward& p, const Device& device,
                                   cudaStream_t stream) {
  for (int first = 0; first < p.sources; first += kScalarTable) {
    ScalarBackwardArgs<T> args;
    args.sources = std::min(p.sources - first, kScalarTable);
    for (int j = 0; j < args.sources; ++j) {
      args.x[j] = static_cast<const T*>(p.x[first + j]);
      args.x_stride[j] = p.x_stride[first + j];
      args.grad_in[j] = static_cast<const T*>(p.grad_in[first + j]);
      args.grad_out[j] = static_cast<T*>(p.grad_out[first + j]);
    }
    for (int c = 0; c < p.ways; ++c) args.dy[c] = static_cast<const T*>(p.dy[c]);
    args.w = static_cast<const T*>(p.w) + first;
    args.dw = static_cast<T*>(p.dw) + first;
    args.w_stride = p.w_stride;
    args.way_stride = p.sources;
    args.tokens = p.tokens;
    args.dim = p.dim;
    args.ways = p.ways;
    backward_scalar<<<scalar_grid(p.tokens, device), scalar_block(p.dim), 0, stream>>>(args);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace muddformer::kernels
