// From logits to losses and, in their place, their gradients: see linear_cross_entropy.h for the
// formula.
//
// A block has one token. Its logits are read once: asynchronous copies bring all of them to shared
// memory, so that a whole row is under way; each thread sums exp(x - m) over what it has copied
// itself, m being the largest it has met; the block adds the sums up, and each thread makes the
// gradients out of what it has in shared memory. Rows too long for that are read a second time,
// then mostly from the second-level cache. Losses alone, without gradients, take one plain read.
#undef NDEBUG  // a target that is no class is never silently wrong
#include <cassert>
#include <cfloat>

#include "../common/device.h"
#include "../common/launch.h"
#include "../common/vector.cuh"
#include "linear_cross_entropy.h"

namespace muddformer::kernels {
namespace {

constexpr int kMaxThreads = 1024;

// As exact as the logits: of 16 bits they have no more to give than the fast form.
template <typename T>
__device__ __forceinline__ float exp_of(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  return __expf(x);
}

// Sums over logits x: the largest, sum exp(x - largest), sum x.
struct Sums {
  float largest = -FLT_MAX;  // logits may be -infinity
  float exps = 0;
  float total = 0;
};

template <typename T>
__device__ __forceinline__ void add_vector(Sums& sums, const uint4& bits, int there, bool total) {
  float x[kVector<T>];
  unpack<T>(bits, x);
  if (there < kVector<T>) {  // the end of a row
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i >= there) x[i] = -INFINITY;
    }
  }
  float largest = x[0];
#pragma unroll
  for (int i = 1; i < kVector<T>; ++i) largest = fmaxf(largest, x[i]);
  if (largest > sums.largest) {
    sums.exps *= exp_of<T>(sums.largest - largest);
    sums.largest = largest;
  }
#pragma unroll
  for (float v : x) sums.exps += exp_of<T>(v - sums.largest);
  if (!total) return;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) sums.total += i < there ? x[i] : 0.0f;
}

template <typename T>
__device__ __forceinline__ Sums warp_total(Sums sums) {
  float largest = sums.largest;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  sums.exps *= exp_of<T>(sums.largest - largest);
  sums.largest = largest;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    sums.exps += __shfl_xor_sync(0xffffffffu, sums.exps, distance);
    sums.total += __shfl_xor_sync(0xffffffffu, sums.total, distance);
  }
  return sums;
}

// Every thread gets the sums of the block; all that it has read from the row before it has read.
template <typename T>
__device__ __forceinline__ Sums block_total(const Sums& sums) {
  __shared__ Sums of_warp[kMaxThreads / 32];
  const int lane = threadIdx.x % 32;
  const Sums own = warp_total<T>(sums);
  if (lane == 0) of_warp[threadIdx.x / 32] = own;
  __syncthreads();
  return warp_total<T>(lane < blockDim.x / 32 ? of_warp[lane] : Sums{});
}

template <typename T, bool kKeeps>
__global__ void __launch_bounds__(kMaxThreads) token_losses_kernel(const TokenLosses p) {
  extern __shared__ __align__(16) unsigned char shared[];
  uint4* const kept = reinterpret_cast<uint4*>(shared);
  const int64_t token = blockIdx.x;
  uint4* const row = reinterpret_cast<uint4*>(static_cast<T*>(p.logits) + token * p.stride);
  const int classes = static_cast<int>(p.classes);
  const int vectors = (classes + kVector<T> - 1) / kVector<T>;
  const int64_t target = p.targets[token];
  if (target == p.ignore_index) {
    if (threadIdx.x == 0) p.losses[token] = 0;
    for (int i = threadIdx.x; p.gradients && i < vectors; i += blockDim.x) {
      __stcs(row + i, make_uint4(0, 0, 0, 0));
    }
    return;
  }
  assert(0 <= target && target < p.classes);

  const bool total = p.label_smoothing > 0;
  const auto there = [=](int i) { return min(classes - i * kVector<T>, kVector<T>); };
  Sums sums;
  if constexpr (kKeeps) {
    const uint32_t to = shared_address(shared);
    const int middle = vectors / 2;
    for (int i = threadIdx.x; i < middle; i += blockDim.x) copy_async<16>(to + i * 16, row + i);
    copy_commit();
    for (int i = middle + threadIdx.x; i < vectors; i += blockDim.x) {
      copy_async<16>(to + i * 16, row + i);
    }
    copy_commit();
    copy_wait<1>();
    for (int i = threadIdx.x; i < middle; i += blockDim.x) {
      add_vector<T>(sums, kept[i], kVector<T>, total);
    }
    copy_wait<0>();
    for (int i = middle + threadIdx.x; i < vectors; i += blockDim.x) {
      add_vector<T>(sums, kept[i], there(i), total);
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
      add_vector<T>(sums, row[i], there(i), total);
    }
  }
  const float of_target = threadIdx.x == 0 ? widen(reinterpret_cast<const T*>(row)[target]) : 0;
  sums = block_total<T>(sums);

  const float lse = sums.largest + logf(sums.exps);
  const float smoothed = p.label_smoothing / static_cast<float>(classes);
  if (threadIdx.x == 0) {
    p.losses[token] = lse - (1 - p.label_smoothing) * of_target +
                      (total ? -smoothed * sums.total : 0.0f) + p.z_loss * lse * lse;
  }
  if (!p.gradients) return;
  const float grad = p.grad_losses != nullptr ? p.grad_losses[token] : 1.0f;
  const float factor = grad * (1 + 2 * p.z_loss * lse) / sums.exps;
  const float minus = grad * smoothed, minus_target = grad * (1 - p.label_smoothing);
  const int at_target = static_cast<int>(target);
#pragma unroll 2
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    float x[kVector<T>];
    unpack<T>(kKeeps ? kept[i] : row[i], x);
    const int place = at_target - i * kVector<T>;
#pragma unroll
    for (int k = 0; k < kVector<T>; ++k) {
      x[k] = factor * exp_of<T>(x[k] - sums.largest) - minus;
      if (k == place) x[k] -= minus_target;
    }
    __stcs(row + i, pack<T>(x));
  }
}

template <typename T>
cudaError_t launch(const TokenLosses& p, cudaStream_t stream) {
  if (p.stride % kVector<T> != 0) return cudaErrorNotSupported;
  Device device{};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const int64_t vectors = (p.classes + kVector<T> - 1) / kVector<T>;
  const int threads =
      static_cast<int>(std::min<int64_t>((vectors + 127) / 128 * 32, kMaxThreads));  // 4 vectors
  const int64_t row_bytes = vectors * 16;
  const auto blocks = static_cast<unsigned>(p.tokens);
  if (!p.gradients || row_bytes + 1024 > device.shared_bytes) {
    token_losses_kernel<T, false><<<blocks, threads, 0, stream>>>(p);
    return cudaGetLastError();
  }
  const cudaError_t refused =
      allow_shared_bytes(token_losses_kernel<T, true>, static_cast<int>(row_bytes));
  if (refused != cudaSuccess) return refused;
  token_losses_kernel<T, true><<<blocks, threads, static_cast<size_t>(row_bytes), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_token_losses(const TokenLosses& p, cudaStream_t stream) {
  if (p.tokens < 0 || p.classes < 1 || p.stride < p.classes) return cudaErrorInvalidValue;
  if (!aligned(p.logits) || p.tokens > INT_MAX || p.classes > kMaxDim) return cudaErrorNotSupported;
  if (p.tokens == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::Float32:
      return launch<float>(p, stream);
    case DType::BFloat16:
      return launch<__nv_bfloat16>(p, stream);
    case DType::Float16:
      return launch<__half>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace muddformer::kernels
