// Backward of the connection weights, the rows of K:
//
//   dA = grad_weights, times 1 - (weights / cap)^2 under a cap
//   e  = r (dA W2) GELU'(h),  coefficient = (r / D) sum_k e_k h_k
//   partials of dW2 = dA^T GELU(h) and of dprior = sum over tokens of dA
//
// grad_weights [N, C*S], W2 [C*S, K], h and e [N, K]. A block serves 64 tokens and a slab of 64
// columns of K. All that it reads is under way at once; its tensors fit the second-level cache, so
// latency is what there is to hide, by many small blocks. The 8 warps stand 2 x 4 over tokens and
// columns of dA W2, then 4 x 2 over rows and columns of dW2. The blocks of a cluster of CL serve
// the same slab of neighbouring tokens and add their parts of dW2 and dprior in the order of their
// ranks.
#pragma once

#include "../common/cluster.cuh"
#include "../common/gelu.cuh"
#include "../common/tensor_core.cuh"
#include "launch.h"

namespace muddformer::kernels {

inline constexpr int kSlabBytes = kSlab * 2;  // of a row of a slab

// Shared memory: dA [64][outputs up to a multiple of 64], h, which GELU(h) replaces, then e and W2
// [outputs up to a multiple of 16][64], in whose place the part of dW2 comes, in float32.
struct HiddenLayout {
  int da_bytes;  // of a row
  int outputs;   // padded
  int sums, coefficients, h, e, w2;

  __device__ explicit HiddenLayout(int of_outputs)
      : da_bytes((of_outputs + 63) / 64 * 128),
        outputs((of_outputs + 15) / 16 * 16),
        sums(kHiddenTokens * da_bytes),
        coefficients(sums + kMaxOutputs * 4),
        h(coefficients + kHiddenTokens * 16),
        e(h + kHiddenTokens * kSlabBytes),
        w2(e + kHiddenTokens * kSlabBytes) {}
};

// dA as it is, eight bytes at a time.
template <typename T>
__device__ __forceinline__ void copy_grad_outputs(const ConnectionWeightsHiddenBackward& p,
                                                  uint32_t tile, const HiddenLayout& layout,
                                                  int64_t token0) {
  const T* grad_weights = static_cast<const T*>(p.grad_weights);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = p.shape.outputs;
  for (int output = lane * 4; output < layout.outputs; output += 128) {
#pragma unroll
    for (int i = 0; i < kHiddenTokens / 8; ++i) {
      const int row = warp + 8 * i;
      const int64_t token = token0 + row;
      const bool valid = token < p.shape.tokens && output < outputs;
      const T* from = valid ? grad_weights + token * outputs + output : grad_weights;
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(
                       tile + swizzled(row, output / 8, layout.da_bytes) + output % 8 * 2),
                   "l"(from), "r"(valid ? 8 : 0)
                   : "memory");
    }
  }
}

// dA with the slope of the cap, or where it cannot be copied in whole words: value by value.
template <typename T>
__device__ __forceinline__ void make_grad_outputs(const ConnectionWeightsHiddenBackward& p,
                                                  unsigned char* tile, const HiddenLayout& layout,
                                                  int64_t token0) {
  const T* grad_weights = static_cast<const T*>(p.grad_weights);
  const T* weights = static_cast<const T*>(p.weights);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, outputs = p.shape.outputs;
  for (int output = lane; output < layout.outputs; output += 32) {
#pragma unroll
    for (int i = 0; i < kHiddenTokens / 8; ++i) {
      const int row = warp + 8 * i;
      const int64_t token = token0 + row, offset = token * outputs + output;
      T da = narrow<T>(0);
      if (token < p.shape.tokens && output < outputs) {
        da = grad_weights[offset];
        if (weights != nullptr) {
          const float t = widen(weights[offset]) / p.shape.cap;
          da = narrow<T>(widen(da) * (1.0f - t * t));
        }
      }
      *reinterpret_cast<T*>(tile + swizzled(row, output / 8, layout.da_bytes) + output % 8 * 2) =
          da;
    }
  }
}

// The slab's columns of h and W2.
template <typename T>
__device__ __forceinline__ void load_slab(const ConnectionWeightsHiddenBackward& p, uint32_t base,
                                          const HiddenLayout& layout, int64_t token0,
                                          int64_t column0) {
  const T* hidden = static_cast<const T*>(p.hidden);
  const T* w2 = static_cast<const T*>(p.w2);
  const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const int64_t column = column0 + chunk * 8, width = p.shape.hidden;
  const bool inside = column < width;
  for (int row = row0; row < layout.outputs; row += kWeightsThreads / 8) {
    const bool valid = inside && row < p.shape.outputs;
    copy_async(base + layout.w2 + swizzled(row, chunk, kSlabBytes),
               valid ? w2 + row * width + column : w2, valid);
  }
#pragma unroll
  for (int i = 0; i < kHiddenTokens / (kWeightsThreads / 8); ++i) {
    const int row = row0 + i * kWeightsThreads / 8;
    const int64_t token = token0 + row;
    const bool valid = inside && token < p.shape.tokens;
    copy_async(base + layout.h + swizzled(row, chunk, kSlabBytes),
               valid ? hidden + token * width + column : hidden, valid);
  }
}

// e and GELU(h) of the products dA W2, and each token's sum of e h over this warp's columns.
template <typename T>
__device__ __forceinline__ void finish_hidden_gradient(const ConnectionWeightsHiddenBackward& p,
                                                       unsigned char* shared,
                                                       const HiddenLayout& layout,
                                                       const float (&product)[2][2][4],
                                                       const float (&factor)[2][2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 2, wn = warp / 2;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = wm * 32 + m * 16 + lane / 4 + 8 * half;
      uint32_t place[2];
      float h[4], value[4], slope[4], e[4], sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        place[n] = swizzled(row, wn * 2 + n, kSlabBytes) + lane % 4 * 4;
        unpack_word<T>(*reinterpret_cast<const uint32_t*>(shared + layout.h + place[n]), h + 2 * n);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) value[i] = h[i];
      gelu(value, slope, p.shape.gelu_tanh);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        e[i] = factor[m][half] * product[m][i / 2][2 * half + i % 2] * slope[i];
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        *reinterpret_cast<uint32_t*>(shared + layout.h + place[n]) = pack_word<T>(value + 2 * n);
        const uint32_t rounded = pack_word<T>(e + 2 * n);
        *reinterpret_cast<uint32_t*>(shared + layout.e + place[n]) = rounded;
        unpack_word<T>(rounded, e + 2 * n);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) sum += e[i] * h[i];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (lane % 4 == 0) {
        reinterpret_cast<float*>(shared + layout.coefficients)[row * 4 + wn] =
            sum * factor[m][half];
      }
    }
  }
}

// A thread's vectors of the block's part of e.
inline constexpr int kEVectors = kHiddenTokens * kSlabBytes / 16 / kWeightsThreads;

// e and the coefficients of the slab to global memory.
template <typename T>
__device__ __forceinline__ void store_hidden_gradient(const ConnectionWeightsHiddenBackward& p,
                                                      const unsigned char* shared,
                                                      const HiddenLayout& layout,
                                                      const uint4 (&e)[kEVectors], int64_t token0,
                                                      int64_t column0) {
#pragma unroll
  for (int i = 0; i < kEVectors; ++i) {
    const int row = threadIdx.x / 8 + i * kWeightsThreads / 8, chunk = threadIdx.x % 8;
    const int64_t token = token0 + row, column = column0 + chunk * 8;
    if (token < p.shape.tokens && column < p.shape.hidden) {
      *reinterpret_cast<uint4*>(static_cast<T*>(p.grad_hidden) + token * p.shape.hidden + column) =
          e[i];
    }
  }
  const int64_t token = token0 + threadIdx.x;
  if (threadIdx.x < kHiddenTokens && token < p.shape.tokens) {
    const float4 s = reinterpret_cast<const float4*>(shared + layout.coefficients)[threadIdx.x];
    p.coefficient[column0 / kSlab * p.shape.tokens + token] =
        ((s.x + s.y) + (s.z + s.w)) / static_cast<float>(p.shape.dim);
  }
}

// This block's part of dW2, and of dprior as the product of dA with ones, into shared memory.
template <typename T>
__device__ __forceinline__ void outputs_gradient(unsigned char* shared, const HiddenLayout& layout,
                                                 bool with_prior) {
  constexpr int kSteps = kHiddenTokens / 16;
  const uint32_t base = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
  uint32_t b[kSteps][2][4];
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      load_right_transposed(b[k][n], base + layout.h, wn * 4 + 2 * n, k * 16, kSlabBytes);
    }
  }
  const float pair[2] = {1, 1};
  const uint32_t ones = pack_word<T>(pair);
  for (int m = wm; m < layout.outputs / 16; m += 4) {
    float acc[4][4] = {}, prior[4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t a[4];
      load_left_transposed(a, base, 2 * m, k * 16, layout.da_bytes);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        multiply_add<T>(acc[n], a, b[k][n / 2][n % 2 * 2], b[k][n / 2][n % 2 * 2 + 1]);
      }
      if (with_prior) multiply_add<T>(prior, a, ones, ones);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + lane / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int column = (wn * 4 + n) * 8 + lane % 4 * 2;
        *reinterpret_cast<float2*>(shared + layout.e + swizzled(row, column / 4, kSlab * 4) +
                                   column % 4 * 4) = {acc[n][2 * half], acc[n][2 * half + 1]};
      }
      if (with_prior && wn == 0 && lane % 4 == 0) {
        reinterpret_cast<float*>(shared + layout.sums)[row] = prior[2 * half];
      }
    }
  }
}

// Adds the parts of the blocks of the cluster; each block writes its share of the sums.
template <int CL>
__device__ __forceinline__ void add_outputs_gradients(const ConnectionWeightsHiddenBackward& p,
                                                      const unsigned char* shared,
                                                      const HiddenLayout& layout, int64_t cluster,
                                                      int rank, int64_t column0) {
  const int outputs = p.shape.outputs, hidden = p.shape.hidden;
  uint32_t block[CL];
#pragma unroll
  for (int q = 0; q < CL; ++q) block[q] = address_of_rank(shared_address(shared), q);
  if (p.w2_partials != nullptr) {
    float* partials = p.w2_partials + cluster * outputs * hidden + column0;
    for (int i = rank * kWeightsThreads + threadIdx.x; i < outputs * 16;
         i += CL * kWeightsThreads) {
      const int row = i / 16, chunk = i % 16;
      if (column0 + chunk * 4 >= hidden) continue;
      const uint32_t place = layout.e + swizzled(row, chunk, kSlab * 4);
      float4 sum{};
#pragma unroll
      for (int q = 0; q < CL; ++q) {
        const float4 v = CL > 1 ? load_four_of_cluster(block[q] + place)
                                : *reinterpret_cast<const float4*>(shared + place);
        sum = {sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w};
      }
      *reinterpret_cast<float4*>(partials + row * hidden + chunk * 4) = sum;
    }
  }
  if (column0 == 0 && rank == 0 && threadIdx.x < outputs) {
    float sum = 0;
#pragma unroll
    for (int q = 0; q < CL; ++q) {
      const uint32_t place = layout.sums + threadIdx.x * 4;
      sum += CL > 1 ? load_of_cluster(block[q] + place)
                    : *reinterpret_cast<const float*>(shared + place);
    }
    p.prior_partials[cluster * outputs + threadIdx.x] = sum;
  }
}

template <typename T, int CL>
__global__ void __launch_bounds__(kWeightsThreads, 3)
    weights_hidden_backward_kernel(const ConnectionWeightsHiddenBackward p, bool whole_words) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const HiddenLayout layout(p.shape.outputs);
  const uint32_t base = shared_address(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 2, wn = warp / 2;
  const int slabs = (p.shape.hidden + kSlab - 1) / kSlab;
  const int rank = static_cast<int>(blockIdx.x % CL);
  const int64_t cluster = blockIdx.x / CL / slabs;
  const int64_t token0 = (cluster * CL + rank) * kHiddenTokens;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x / CL % slabs) * kSlab;

  wait_for_kernel_before();
  load_slab<T>(p, base, layout, token0, column0);
  if (whole_words) {
    copy_grad_outputs<T>(p, base, layout, token0);
  } else {
    make_grad_outputs<T>(p, shared, layout, token0);
  }
  copy_commit();
  float factor[2][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t token = token0 + wm * 32 + i / 2 * 16 + lane / 4 + i % 2 * 8;
    factor[i / 2][i % 2] = token < p.shape.tokens ? p.factor[token] : 0;
  }
  copy_wait<0>();
  __syncthreads();

  float product[2][2][4] = {};
  for (int k = 0; k < layout.outputs; k += 16) {
    uint32_t a[2][4], b[4];
    load_right_transposed(b, base + layout.w2, wn * 2, k, kSlabBytes);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      load_left(a[m], base, wm * 32 + m * 16, k / 8, layout.da_bytes);
      multiply_add<T>(product[m][0], a[m], b[0], b[1]);
      multiply_add<T>(product[m][1], a[m], b[2], b[3]);
    }
  }
  finish_hidden_gradient<T>(p, shared, layout, product, factor);
  __syncthreads();
  uint4 e[kEVectors];
#pragma unroll
  for (int i = 0; i < kEVectors; ++i) {
    const int row = threadIdx.x / 8 + i * kWeightsThreads / 8, chunk = threadIdx.x % 8;
    e[i] = *reinterpret_cast<const uint4*>(shared + layout.e + swizzled(row, chunk, kSlabBytes));
  }
  __syncthreads();  // e and W2 give way to the part of dW2
  outputs_gradient<T>(shared, layout, column0 == 0);
  cluster_sync<CL>();  // would wait for stores to global memory: they come after it
  store_hidden_gradient<T>(p, shared, layout, e, token0, column0);
  add_outputs_gradients<CL>(p, shared, layout, cluster, rank, column0);
  // No block ends before the others have read its part.
  cluster_arrive_relaxed<CL>();
  cluster_wait<CL>();
}

template <typename T, int CL>
cudaError_t hidden_backward_of(const ConnectionWeightsHiddenBackward& p, const Device& device,
                               cudaStream_t stream) {
  const int slabs = padded_hidden(p.shape.hidden) / kSlab;
  const bool whole_words = p.weights == nullptr && p.shape.outputs % 4 == 0 &&
                           reinterpret_cast<uintptr_t>(p.grad_weights) % 8 == 0;
  return launch_wide(weights_hidden_backward_kernel<T, CL>, device,
                     hidden_backward_groups(p.shape.tokens, CL) * CL * slabs, CL, kWeightsThreads,
                     hidden_backward_shared_bytes(p.shape.outputs), stream, p, whole_words);
}

template <typename T>
cudaError_t weights_hidden_backward(const ConnectionWeightsHiddenBackward& p, const Device& device,
                                    cudaStream_t stream) {
  return device.bulk_copy ? hidden_backward_of<T, kHiddenCluster>(p, device, stream)
                          : hidden_backward_of<T, 1>(p, device, stream);
}

}  // namespace muddformer::kernels
