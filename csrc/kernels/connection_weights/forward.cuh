// Forward of the connection weights, one kernel for every GPU (Hopper has a faster form,
// forward_hopper.cu):
//
//   r = rsqrt(mean(x^2) + eps),  h = r x W1^T,  A = GELU(h) W2^T + prior,  cap * tanh(A / cap)
//
// x [N, D], W1 [K, D], W2 [C*S, K], A [N, C*S]; K is padded to 32 * NT columns. r commutes with W1,
// so one read of x feeds the product and the sum of squares, which is taken from the fragments of
// the left operand. GELU(h) stays in shared memory for the second product.
//
// A cluster of CL blocks serves 128 tokens. Each block takes one of CL parts of D through a ring
// of stages of 64 columns of x and W1 (asynchronous copies); its 8 warps stand 2 x 4 over tokens
// and hidden columns. Then the blocks add their sums (forward_finish.cuh). More blocks a cluster
// fill the device when tokens are few, and read less of W1 each.
#pragma once

#include "forward_finish.cuh"

namespace muddformer::kernels {

// Blocks that share a multiprocessor.
constexpr int forward_blocks(int nt) {
  return nt <= 2 ? 2 : 1;
}

// Columns [step * 64, + 64) of x and W1 into a stage.
template <typename T, int NT, int CL>
__device__ __forceinline__ void load_forward_stage(const ConnectionWeightsForward& p,
                                                   uint32_t stage, int64_t token0, int step) {
  using Layout = ForwardLayout<NT, CL>;
  const int row0 = threadIdx.x / 8, chunk = threadIdx.x % 8;
  const int64_t dim = p.shape.dim, column = static_cast<int64_t>(step) * kForwardStep + chunk * 8;
  const T* x = static_cast<const T*>(p.x);
  const T* w1 = static_cast<const T*>(p.w1);
  const bool inside = column < dim;
#pragma unroll
  for (int i = 0; i < kForwardTokens / 32; ++i) {
    const int row = row0 + 32 * i;
    const bool valid = inside && token0 + row < p.shape.tokens;
    copy_async(stage + Layout::kX + swizzled(row, chunk, kForwardStep * 2),
               valid ? x + (token0 + row) * dim + column : x, valid);
  }
#pragma unroll
  for (int i = 0; i < NT; ++i) {
    const int row = row0 + 32 * i;
    const bool valid = inside && row < p.shape.hidden;
    copy_async(stage + Layout::kW1 + swizzled_pairs(row, chunk, kForwardStep * 2),
               valid ? w1 + row * dim + column : w1, valid);
  }
}

// The fragments of 16 columns of a stage.
template <int NT>
struct ForwardFragments {
  uint32_t a[4][4], b[NT / 2][4];

  __device__ __forceinline__ void load(uint32_t x, uint32_t w1, int k, int wm, int wn) {
    constexpr int kRowBytes = kForwardStep * 2;
#pragma unroll
    for (int m = 0; m < 4; ++m) load_left(a[m], x, wm * 64 + m * 16, 2 * k, kRowBytes);
#pragma unroll
    for (int n = 0; n < NT / 2; ++n)
      load_right_pairs(b[n], w1, (wn * NT + 2 * n) * 8, 2 * k, kRowBytes);
  }
};

// The product x W1^T over this block's part of D, and this warp's share of the sums of squares: of
// its four tiles of rows the one whose number is wn, rows lane / 4 and lane / 4 + 8.
template <typename T, int NT, int CL>
__device__ __forceinline__ void forward_main_loop(const ConnectionWeightsForward& p, uint32_t base,
                                                  int stages, int64_t token0, int rank,
                                                  float (&acc)[4][NT][4], float (&squares)[2]) {
  using Layout = ForwardLayout<NT, CL>;
  constexpr int kBuffers = NT <= 8 ? 2 : 1;  // more registers there are not
  const int warp = threadIdx.x / 32, wm = warp % 2, wn = warp / 2;
  const int steps = static_cast<int>((p.shape.dim + kForwardStep - 1) / kForwardStep);
  const uint32_t ring = base + Layout::kStages;
  const int first = steps * rank / CL, count = steps * (rank + 1) / CL - first;
  for (int s = 0; s < stages - 1; ++s) {
    if (s < count)
      load_forward_stage<T, NT, CL>(p, ring + s * Layout::kStageBytes, token0, first + s);
    copy_commit();
  }
  int slot = 0, free_slot = stages - 1;
  for (int i = 0; i < count; ++i) {
    copy_wait_stage(stages);
    __syncthreads();
    const uint32_t x = ring + slot * Layout::kStageBytes + Layout::kX;
    const uint32_t w1 = ring + slot * Layout::kStageBytes + Layout::kW1;
    ForwardFragments<NT> fragments[kBuffers];
    fragments[0].load(x, w1, 0, wm, wn);
    if (i + stages - 1 < count) {
      load_forward_stage<T, NT, CL>(p, ring + free_slot * Layout::kStageBytes, token0,
                                    first + i + stages - 1);
    }
    copy_commit();
#pragma unroll
    for (int k = 0; k < kForwardStep / 16; ++k) {
      if (kBuffers == 2 && k + 1 < kForwardStep / 16) {
        fragments[(k + 1) % kBuffers].load(x, w1, k + 1, wm, wn);
      } else if (kBuffers == 1 && k > 0) {
        fragments[0].load(x, w1, k, wm, wn);
      }
      const ForwardFragments<NT>& f = fragments[k % kBuffers];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int m = 0; m < 4; ++m) {
          multiply_add<T>(acc[m][n], f.a[m], f.b[n / 2][n % 2 * 2], f.b[n / 2][n % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = wn % 2 == 0 ? f.a[0][j] : f.a[1][j];
        const uint32_t high = wn % 2 == 0 ? f.a[2][j] : f.a[3][j];
        float v[2];
        unpack_word<T>(wn < 2 ? low : high, v);
        squares[j % 2] += v[0] * v[0] + v[1] * v[1];
      }
    }
    slot = slot + 1 == stages ? 0 : slot + 1;
    free_slot = free_slot + 1 == stages ? 0 : free_slot + 1;
  }
  copy_wait<0>();
}

// This block's sums into shared memory.
template <int NT>
__device__ __forceinline__ void store_sums(unsigned char* tile, const float (&acc)[4][NT][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 2, wn = warp / 2;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
#pragma unroll
    for (int n = 0; n < NT; n += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = wm * 64 + m * 16 + lane / 4 + 8 * half;
        const int chunk = (wn * NT + n) * 2 + lane % 4;
        *reinterpret_cast<float4*>(tile + swizzled(row, chunk, 128 * NT)) = {
            acc[m][n][2 * half], acc[m][n][2 * half + 1], acc[m][n + 1][2 * half],
            acc[m][n + 1][2 * half + 1]};
      }
    }
  }
}

template <typename T, int NT, int CL>
__global__ void __launch_bounds__(kWeightsThreads, forward_blocks(NT))
    connection_weights_forward(const ConnectionWeightsForward p, int stages) {
  using Layout = ForwardLayout<NT, CL>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t base = shared_address(shared);
  const int rank = CL > 1 ? static_cast<int>(blockIdx.x % CL) : 0;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x / CL) * kForwardTokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 2, wn = warp / 2;

  wait_for_kernel_before();
  float* all_squares = reinterpret_cast<float*>(shared);
  float* priors = reinterpret_cast<float*>(shared + Layout::kPrior);
  if (threadIdx.x < p.shape.outputs) {
    priors[threadIdx.x] = load_mixed<T>(p.prior, threadIdx.x, p.prior_float32);
  }
  float acc[4][NT][4] = {};
  float squares[2] = {};
  forward_main_loop<T, NT, CL>(p, base, stages, token0, rank, acc, squares);
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = squares[half];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane % 4 == 0) all_squares[wm * 64 + wn * 16 + lane / 4 + 8 * half] = sum;
  }
  store_sums<NT>(shared + Layout::kSums, acc);
  finish_forward<T, NT, CL>(p, shared, token0, rank);
}

template <typename T, int NT, int CL>
cudaError_t launch_forward_cluster(const ConnectionWeightsForward& p, const Device& device,
                                   cudaStream_t stream) {
  using Layout = ForwardLayout<NT, CL>;
  // Two blocks share a multiprocessor while K is small; 1 KB of each is the system's.
  const int half = device.shared_bytes / 2 - 1024;
  const int limit =
      forward_blocks(NT) == 2 && Layout::bytes(2) <= half ? half : device.shared_bytes;
  int stages = 4;
  while (stages > 2 && Layout::bytes(stages) > limit) --stages;
  const int64_t tiles = (p.shape.tokens + kForwardTokens - 1) / kForwardTokens;
  return launch_wide(connection_weights_forward<T, NT, CL>, device, tiles * CL, CL, kWeightsThreads,
                     Layout::bytes(stages), stream, p, stages);
}

template <typename T, int NT>
cudaError_t forward_of(const ConnectionWeightsForward& p, const Device& device,
                       cudaStream_t stream) {
  const int cluster = forward_cluster(p, device);
  // The sums and GELU(h) of 128 rows of the widest tile are more than one block can hold.
  if constexpr (NT <= 8) {
    if (cluster == 1) return launch_forward_cluster<T, NT, 1>(p, device, stream);
  }
  return cluster == 4 ? launch_forward_cluster<T, NT, 4>(p, device, stream)
                      : launch_forward_cluster<T, NT, 2>(p, device, stream);
}

template <typename T>
cudaError_t weights_forward(const ConnectionWeightsForward& p, const Device& device,
                            cudaStream_t stream) {
  switch (padded_hidden(p.shape.hidden) / 32) {
    case 2:
      return forward_of<T, 2>(p, device, stream);
    case 4:
      return forward_of<T, 4>(p, device, stream);
    case 6:
      return forward_of<T, 6>(p, device, stream);
    case 8:
      return forward_of<T, 8>(p, device, stream);
    default:
      return forward_of<T, 10>(p, device, stream);
  }
}

}  // namespace muddformer::kernels
