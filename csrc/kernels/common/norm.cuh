// What the kernels that norm their streams share: weights of a norm, and sums over the consumers of
// a block.
#pragma once

#include <cstdint>

#include "ring.cuh"
#include "vector.cuh"
#include "warp_sums.cuh"

namespace muddformer::kernels {

// A vector of a norm's weight or bias, which is float32 (wide) or of type T.
template <typename T>
__device__ __forceinline__ void load_norm(const void* from, bool wide, int column,
                                          float (&to)[kVector<T>]) {
  if (std::is_same_v<T, float> || wide) {
    const float* floats = static_cast<const float*>(from) + column;
#pragma unroll
    for (int i = 0; i < kVector<T>; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(floats + i));
      to[i] = four.x;
      to[i + 1] = four.y;
      to[i + 2] = four.z;
      to[i + 3] = four.w;
    }
  } else {
    unpack<T>(__ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(from) + column)), to);
  }
}

// One entry of it.
template <typename T>
__device__ __forceinline__ float norm_entry(const void* from, bool wide, int column) {
  return wide ? static_cast<const float*>(from)[column]
              : static_cast<float>(widen(static_cast<const T*>(from)[column]));
}

// A word of RMSNorm(x) * weight, r being the factor of the row: alike wherever it is made.
template <typename T>
__device__ __forceinline__ uint32_t rms_normed_word(const float* x, float r, const float* weight) {
  float normed[kWord<T>];
#pragma unroll
  for (int i = 0; i < kWord<T>; ++i) normed[i] = x[i] * (r * weight[i]);
  return pack_word<T>(normed);
}

// A vector of it.
template <typename T>
__device__ __forceinline__ uint4 rms_normed(const float (&x)[kVector<T>], float r,
                                            const float (&weight)[kVector<T>]) {
  uint4 bits;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const int i = word * kWord<T>;
    set_word(bits, word, rms_normed_word<T>(x + i, r, weight + i));
  }
  return bits;
}

#if __CUDA_ARCH__ >= 900

// This warp's shares of N sums over the consumers. shares: [warps][N].
template <int N>
__device__ __forceinline__ void put_shares(float (&values)[N], float* shares) {
  const int lane = threadIdx.x % 32;
  const int first = warp_sums<N>(values, lane);
  if (lane % kSharers<N> == 0) {
#pragma unroll
    for (int i = 0; i < N >> kHalvings<N>; ++i) {
      shares[threadIdx.x / 32 * N + first + i] = values[i];
    }
  }
}

// The sums of all shares, added in the order of the warps.
template <int N>
__device__ __forceinline__ void get_sums(const float* shares, int warps, float (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.0f;
#pragma unroll 4
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += shares[warp * N + i];
  }
}

// Adds up N values over the consumers; every thread gets the sums. shares are free again after the
// next barrier of the consumers.
template <int N>
__device__ __forceinline__ void consumer_sums(float (&values)[N], float* shares, int consumers) {
  put_shares<N>(values, shares);
  sync_consumers(consumers);
  get_sums<N>(shares, consumers / 32, values);
}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
