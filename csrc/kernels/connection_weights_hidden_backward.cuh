// Backward of the connection weights, the rows of K:
//
//   dA = grad_weights, times 1 - (weights / cap)^2 under a cap
//   e  = r (dA W2) GELU'(h),  coefficient = (r / D) sum_k e_k h_k
//   GELU(h) for dW2, and the sums of dA over the tokens of a block for dprior
//
// grad_weights [N, C*S], W2 [C*S, K], h and e [N, K]; K is padded to 32 * NT columns. A block
// serves 64 tokens with all of W2 in shared memory; its 8 warps stand 2 x 4 over tokens and hidden
// columns. The products go through shared memory, so that h, e and GELU(h) move in whole vectors:
// four threads a token.
#pragma once

#include "connection_weights_gelu.cuh"
#include "connection_weights_launch.h"
#include "tensor_core.cuh"

namespace muddformer::kernels {

inline constexpr int kHiddenTokens = 64;
inline constexpr int kOutputsPerLane = kMaxOutputs / 32;

// Shared memory: dA [64][outputs up to a multiple of 64], W2 [outputs up to a multiple of 16][K],
// then in their place the sums over tokens and the products [64][K + 4] in float32.
struct HiddenLayout {
  int da_bytes;  // of a row
  int w2_rows;
  int w2;  // offset

  __device__ explicit HiddenLayout(int outputs)
      : da_bytes((outputs + 63) / 64 * 128),
        w2_rows((outputs + 15) / 16 * 16),
        w2(kHiddenTokens * da_bytes) {}
};

// dA of 64 tokens into shared memory, and their sums over this warp's tokens. The loads of two
// tokens are all under way before the first is used.
template <typename T>
__device__ __forceinline__ void load_grad_outputs(const ConnectionWeightsHiddenBackward& p,
                                                  unsigned char* tile, const HiddenLayout& layout,
                                                  int64_t token0, float (&sums)[kOutputsPerLane]) {
  constexpr int kWarps = kWeightsThreads / 32, kAhead = 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int outputs = p.shape.outputs;
  const T* grad_weights = static_cast<const T*>(p.grad_weights);
  const T* weights = static_cast<const T*>(p.weights);
  for (int row0 = warp; row0 < kHiddenTokens; row0 += kAhead * kWarps) {
    T grad[kAhead][kOutputsPerLane], a[kAhead][kOutputsPerLane];
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int64_t token = token0 + row0 + r * kWarps;
#pragma unroll
      for (int i = 0; i < kOutputsPerLane; ++i) {
        const bool valid = token < p.shape.tokens && lane + 32 * i < outputs;
        const int64_t offset = valid ? token * outputs + lane + 32 * i : 0;
        grad[r][i] = narrow<T>(0);
        a[r][i] = narrow<T>(0);
        if (valid) grad[r][i] = grad_weights[offset];
        if (valid && weights != nullptr) a[r][i] = weights[offset];
      }
    }
#pragma unroll
    for (int r = 0; r < kAhead; ++r) {
      const int row = row0 + r * kWarps;
      const int64_t token = token0 + row;
#pragma unroll
      for (int i = 0; i < kOutputsPerLane; ++i) {
        const int output = lane + 32 * i;
        if (output >= layout.w2_rows) continue;
        float da = widen(grad[r][i]);
        if (weights != nullptr) {
          const float t = widen(a[r][i]) / p.shape.cap;
          da *= 1.0f - t * t;
        }
        sums[i] += da;
        const T narrow_da = narrow<T>(da);
        *reinterpret_cast<T*>(tile + swizzled(row, output / 8, layout.da_bytes) + output % 8 * 2) =
            narrow_da;
        if (p.grad_outputs != nullptr && token < p.shape.tokens && output < outputs) {
          static_cast<T*>(p.grad_outputs)[token * outputs + output] = narrow_da;
        }
      }
    }
  }
}

template <typename T, int NT>
__device__ __forceinline__ void load_all_w2(const ConnectionWeightsHiddenBackward& p, uint32_t tile,
                                            int rows) {
  constexpr int kChunks = 4 * NT;  // of a row
  const T* w2 = static_cast<const T*>(p.w2);
  for (int index = threadIdx.x; index < rows * kChunks; index += kWeightsThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const bool valid = row < p.shape.outputs && chunk * 8 < p.shape.hidden;
    copy_async(tile + swizzled(row, chunk, kChunks * 16),
               valid ? w2 + static_cast<int64_t>(row) * p.shape.hidden + chunk * 8 : w2, valid);
  }
  copy_commit();
}

// e, GELU(h) and the coefficient of the tokens out of the products.
template <typename T, int NT>
__device__ __forceinline__ void finish_hidden_gradient(const ConnectionWeightsHiddenBackward& p,
                                                       const float* products, int64_t token0) {
  const int row = threadIdx.x / 4, quarter = threadIdx.x % 4;
  const int64_t token = token0 + row, offset = token * p.shape.hidden;
  const bool valid = token < p.shape.tokens;
  const float factor = valid ? p.factor[token] : 0;
  float sum = 0;
#pragma unroll 2
  for (int chunk = quarter; chunk < 4 * NT; chunk += 4) {
    if (!valid || chunk * 8 >= p.shape.hidden) continue;
    const float* product = products + row * (32 * NT + 4) + chunk * 8;
    float h[8], value[8], slope[8], e[8];
    unpack<T>(*reinterpret_cast<const uint4*>(static_cast<const T*>(p.hidden) + offset + chunk * 8),
              h);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = h[i];
    gelu(value, slope, p.shape.gelu_tanh);
#pragma unroll
    for (int i = 0; i < 8; ++i) e[i] = factor * product[i] * slope[i];
    const uint4 rounded = pack<T>(e);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.gelu) + offset + chunk * 8) = pack<T>(value);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.grad_hidden) + offset + chunk * 8) = rounded;
    unpack<T>(rounded, e);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += e[i] * h[i];
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (valid && quarter == 0) {
    p.coefficient[token] = sum * factor / static_cast<float>(p.shape.dim);
  }
}

template <typename T, int NT>
__global__ void __launch_bounds__(kWeightsThreads)
    weights_hidden_backward_kernel(const ConnectionWeightsHiddenBackward p) {
  constexpr int kPadded = 32 * NT;
  extern __shared__ __align__(1024) unsigned char shared[];
  const HiddenLayout layout(p.shape.outputs);
  const uint32_t base = address_in_shared(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 2, wn = warp / 2;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kHiddenTokens;

  load_all_w2<T, NT>(p, base + layout.w2, layout.w2_rows);
  float column_sums[kOutputsPerLane] = {};
  load_grad_outputs<T>(p, shared, layout, token0, column_sums);
  copy_wait<0>();
  __syncthreads();

  float acc[2][NT][4] = {};
  for (int k = 0; k < layout.w2_rows; k += 16) {
    uint32_t a[2][4];
#pragma unroll
    for (int m = 0; m < 2; ++m) load_left(a[m], base, wm * 32 + m * 16, k / 8, layout.da_bytes);
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
      uint32_t b[4];
      load_right_transposed(b, base + layout.w2, wn * NT + n, k, kPadded * 2);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        multiply_add<T>(acc[m][n], a[m], b[0], b[1]);
        multiply_add<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
  __syncthreads();  // dA and W2 give way to the sums and the products

  float* warp_sums = reinterpret_cast<float*>(shared);  // [8][outputs]
  float* products = reinterpret_cast<float*>(shared + kHiddenSumsBytes);
#pragma unroll
  for (int i = 0; i < kOutputsPerLane; ++i) {
    const int output = lane + 32 * i;
    if (output < p.shape.outputs) warp_sums[warp * p.shape.outputs + output] = column_sums[i];
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int row = wm * 32 + m * 16 + lane / 4, column = (wn * NT + n) * 8 + lane % 4 * 2;
      float* to = products + row * (kPadded + 4) + column;
      *reinterpret_cast<float2*>(to) = {acc[m][n][0], acc[m][n][1]};
      *reinterpret_cast<float2*>(to + 8 * (kPadded + 4)) = {acc[m][n][2], acc[m][n][3]};
    }
  }
  __syncthreads();

  finish_hidden_gradient<T, NT>(p, products, token0);
  for (int output = threadIdx.x; output < p.shape.outputs; output += kWeightsThreads) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWeightsThreads / 32; ++w) sum += warp_sums[w * p.shape.outputs + output];
    p.prior_partials[static_cast<int64_t>(blockIdx.x) * p.shape.outputs + output] = sum;
  }
}

template <typename T, int NT>
cudaError_t hidden_backward_of(const ConnectionWeightsHiddenBackward& p, cudaStream_t stream) {
  return launch_wide(weights_hidden_backward_kernel<T, NT>, hidden_backward_blocks(p.shape.tokens),
                     1, kWeightsThreads,
                     hidden_backward_shared_bytes(p.shape.hidden, p.shape.outputs), stream, p);
}

template <typename T>
cudaError_t weights_hidden_backward(const ConnectionWeightsHiddenBackward& p, cudaStream_t stream) {
  switch (padded_hidden(p.shape.hidden) / 32) {
    case 2:
      return hidden_backward_of<T, 2>(p, stream);
    case 4:
      return hidden_backward_of<T, 4>(p, stream);
    case 6:
      return hidden_backward_of<T, 6>(p, stream);
    case 8:
      return hidden_backward_of<T, 8>(p, stream);
    default:
      return hidden_backward_of<T, 10>(p, stream);
  }
}

}  // namespace muddformer::kernels
