// Forward of the connection weights on Hopper (compute capability 9.0a):
//
//   r = rsqrt(mean(x^2) + eps),  h = r x W1^T,  A = GELU(h) W2^T + prior,  cap * tanh(A / cap)
//
// As forward.cuh, with the same second half: a cluster of CL blocks serves 128 tokens, each block a
// part of D. Here one thread brings boxes of 64 columns of x and W1 into the ring, two warpgroups
// multiply 64 tokens each straight from shared memory, and take the sums of squares from there
// meanwhile.
#include "../common/tensor_copy.cuh"
#include "../common/warpgroup.cuh"
#include "forward_finish.cuh"

namespace muddformer::kernels {
namespace {

constexpr int kStagesAtMost = 6;

struct Matrices {
  CUtensorMap x, w1;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Barriers {
  uint64_t full[kStagesAtMost], empty[kStagesAtMost];
};

// The producer: one thread.
template <int NT, int CL>
__device__ __forceinline__ void load_stages(const Matrices& matrices, Barriers& barriers,
                                            uint32_t ring, int stages, int64_t token0, int first,
                                            int count) {
  using Layout = ForwardLayout<NT, CL>;
  RingPlace place;
  for (int i = 0; i < count; ++i) {
    const uint32_t stage = ring + place.index * Layout::kStageBytes;
    const int64_t column = static_cast<int64_t>(first + i) * kForwardStep;
    uint64_t* full = &barriers.full[place.index];
    if (i >= stages) barrier_wait(&barriers.empty[place.index], place.phase ^ 1);
    barrier_expect(full, Layout::kStageBytes);
    for (int t = 0; t < kForwardTokens; t += 64) {
      load_box(stage + Layout::kX + t * 128, matrices.x, column, token0 + t, full);
    }
    for (int k = 0; k < Layout::kPadded; k += 64) {
      load_box(stage + Layout::kW1 + k * 128, matrices.w1, column, k, full);
    }
    place.advance(stages);
  }
}

// x W1^T of a warpgroup's 64 tokens over this block's part of D, and the sum of squares of half of
// row threadIdx.x % 128 / 2.
template <typename T, int NT, int CL>
__device__ __forceinline__ void consume_stages(Barriers& barriers, const unsigned char* ring,
                                               int stages, int count, float (&sums)[16 * NT],
                                               float (&squares)[4]) {
  using Layout = ForwardLayout<NT, CL>;
  const int group =
      __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the compiler sees: one a warp
  const int row = threadIdx.x % 128 / 2;
  RingPlace place;
  for (int i = 0; i < count; ++i) {
    const unsigned char* stage = ring + place.index * Layout::kStageBytes;
    const unsigned char* x_box = stage + Layout::kX + group * kBoxBytes;
    const uint64_t x = operand_columns_of_k(shared_address(x_box));
    const uint64_t w1 = operand_columns_of_k(shared_address(stage) + Layout::kW1);
    barrier_wait(&barriers.full[place.index], place.phase);
    uint4 half_row[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      half_row[c] =
          *reinterpret_cast<const uint4*>(x_box + swizzled(row, threadIdx.x % 2 * 4 + c, 128));
    }
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < kForwardStep / 16; ++k) {
      warpgroup_multiply<T, 0, 0>(sums, x + k * kColumnsStep, w1 + k * kColumnsStep, 1);
    }
    warpgroup_commit();
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float v[8];
      unpack<T>(half_row[c], v);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares[j % 4] += v[j] * v[j];
    }
    warpgroup_wait<0>();  // the other warpgroup keeps the tensor cores busy
    warpgroup_settle(sums);
    release(&barriers.empty[place.index]);
    place.advance(stages);
  }
}

// This block's sums into shared memory.
template <int NT>
__device__ __forceinline__ void store_group_sums(unsigned char* tile,
                                                 const float (&sums)[16 * NT]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 16 * NT; i += 2) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(tile + swizzled(row, column / 4, 128 * NT) + column % 4 * 4) = {
        sums[i], sums[i + 1]};
  }
}

#endif

template <typename T, int NT, int CL>
__global__ void __launch_bounds__(kWeightsThreads + 32, 1)
    connection_weights_forward_hopper(const __grid_constant__ Matrices matrices,
                                      const __grid_constant__ ConnectionWeightsForward p,
                                      int stages) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Layout = ForwardLayout<NT, CL>;
  extern __shared__ unsigned char unaligned[];
  __shared__ Barriers barriers;
  // At the same place in all blocks of a cluster, which read each other's sums.
  unsigned char* shared = unaligned + (-shared_address(unaligned) & 1023u);
  const uint32_t base = shared_address(shared);
  const int rank = CL > 1 ? static_cast<int>(blockIdx.x % CL) : 0;
  const int64_t token0 = static_cast<int64_t>(blockIdx.x / CL) * kForwardTokens;
  const int steps = static_cast<int>((p.shape.dim + kForwardStep - 1) / kForwardStep);
  const int first = steps * rank / CL, count = steps * (rank + 1) / CL - first;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], kWeightsThreads);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_kernel_before();
  if (threadIdx.x >= kWeightsThreads) {
    if (threadIdx.x == kWeightsThreads) {
      load_stages<NT, CL>(matrices, barriers, base + Layout::kStages, stages, token0, first, count);
    }
    return;
  }
  float* priors = reinterpret_cast<float*>(shared + Layout::kPrior);
  if (threadIdx.x < p.shape.outputs) {
    priors[threadIdx.x] = load_mixed<T>(p.prior, threadIdx.x, p.prior_float32);
  }
  float sums[16 * NT] = {}, parts[4] = {};  // parts: of the sum of squares
  consume_stages<T, NT, CL>(barriers, shared + Layout::kStages, stages, count, sums, parts);
  sync_consumers(kWeightsThreads);  // the ring gives way to the sums
  float squares = (parts[0] + parts[1]) + (parts[2] + parts[3]);
  squares += __shfl_xor_sync(0xffffffffu, squares, 1);
  if (threadIdx.x % 2 == 0) reinterpret_cast<float*>(shared)[threadIdx.x / 2] = squares;
  store_group_sums<NT>(shared + Layout::kSums, sums);
  finish_forward<T, NT, CL>(p, shared, token0, rank);
#endif
}

template <typename T, int NT, int CL>
cudaError_t launch(const ConnectionWeightsForward& p, const Device& device,
                   const Matrices& matrices, cudaStream_t stream) {
  using Layout = ForwardLayout<NT, CL>;
  constexpr int kOther = 1024 + static_cast<int>(sizeof(uint64_t)) * 2 * kStagesAtMost;
  int stages = kStagesAtMost;
  while (Layout::bytes(stages) + kOther > device.shared_bytes) --stages;
  const int64_t tiles = (p.shape.tokens + kForwardTokens - 1) / kForwardTokens;
  return launch_wide(connection_weights_forward_hopper<T, NT, CL>, device, tiles * CL, CL,
                     kWeightsThreads + 32, 1024 + Layout::bytes(stages), stream, matrices, p,
                     stages);
}

template <typename T, int NT>
cudaError_t launch(const ConnectionWeightsForward& p, const Device& device,
                   const Matrices& matrices, cudaStream_t stream) {
  switch (forward_cluster(p, device)) {
    case 1:
      return launch<T, NT, 1>(p, device, matrices, stream);
    case 2:
      return launch<T, NT, 2>(p, device, matrices, stream);
    default:
      return launch<T, NT, 4>(p, device, matrices, stream);
  }
}

template <typename T>
cudaError_t launch(const ConnectionWeightsForward& p, const Device& device,
                   const Matrices& matrices, cudaStream_t stream) {
  switch (padded_hidden(p.shape.hidden) / 64) {
    case 1:
      return launch<T, 2>(p, device, matrices, stream);
    case 2:
      return launch<T, 4>(p, device, matrices, stream);
    default:
      return launch<T, 6>(p, device, matrices, stream);
  }
}

}  // namespace

cudaError_t weights_forward_hopper(const ConnectionWeightsForward& p, const Device& device,
                                   cudaStream_t stream) {
  const ConnectionWeightsShape& s = p.shape;
  Matrices matrices{};
  cudaError_t error = describe_matrix(matrices.x, s.dtype, p.x, s.tokens, s.dim);
  if (error == cudaSuccess) {
    error = describe_matrix(matrices.w1, s.dtype, p.w1, s.hidden, s.dim);
  }
  if (error != cudaSuccess) return error;
  return s.dtype == DType::BFloat16 ? launch<__nv_bfloat16>(p, device, matrices, stream)
                                    : launch<__half>(p, device, matrices, stream);
}

}  // namespace muddformer::kernels
