// Elements, 16-byte vectors of them, and the few loads and stores that the aggregation kernels
// share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace muddformer::kernels {

// Sums are kept in float32, in float64 for float64.
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
__device__ __forceinline__ Sum<T> widen(T value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat162float(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return value;
  }
}

template <typename T>
__device__ __forceinline__ T narrow(Sum<T> value) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

// Elements in 16 bytes, and in the 4 bytes of a word.
template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));
template <typename T>
inline constexpr int kWord = 4 / static_cast<int>(sizeof(T));

__device__ __forceinline__ uint32_t word_of(const uint4& bits, int i) {
  return i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w;
}

__device__ __forceinline__ void set_word(uint4& bits, int i, uint32_t word) {
  (i == 0 ? bits.x : i == 1 ? bits.y : i == 2 ? bits.z : bits.w) = word;
}

template <typename T>
__device__ __forceinline__ void unpack_word(uint32_t bits, float* values) {
  if constexpr (std::is_same_v<T, float>) {
    values[0] = __uint_as_float(bits);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    values[0] = __uint_as_float(bits << 16);
    values[1] = __uint_as_float(bits & 0xffff0000u);
  } else {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(bits));
    values[0] = pair.x;
    values[1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack_word(const float* values) {
  if constexpr (std::is_same_v<T, float>) {
    return __float_as_uint(values[0]);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(values[0], values[1]);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(values[0], values[1]);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <typename T>
__device__ __forceinline__ void unpack(const uint4& bits, float (&values)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack_word<T>(word_of(bits, i), values + i * kWord<T>);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[kVector<T>]) {
  return make_uint4(pack_word<T>(values), pack_word<T>(values + kWord<T>),
                    pack_word<T>(values + 2 * kWord<T>), pack_word<T>(values + 3 * kWord<T>));
}

// Hidden states are read once and written once: neither is worth a place in the first-level cache.
__device__ __forceinline__ uint4 load_once(const void* address) {
  uint4 bits;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(address));
  return bits;
}

__device__ __forceinline__ void store_once(void* address, const uint4& bits) {
  __stcs(reinterpret_cast<uint4*>(address), bits);
}

// The weights of a token lie in shared memory as float [S][kWaysPadded<C>], so that one load
// fetches those of a source.
template <int C>
inline constexpr int kWaysPadded = C == 3 ? 4 : C;

template <int C>
constexpr int weights_bytes(int sources) {
  return sources * kWaysPadded<C> * static_cast<int>(sizeof(float));
}

template <int C>
__device__ __forceinline__ void read_ways(const float* row, float (&w)[C]) {
  if constexpr (C >= 3) {
    const float4 four = *reinterpret_cast<const float4*>(row);
    w[0] = four.x;
    w[1] = four.y;
    w[2] = four.z;
    if constexpr (C == 4) w[3] = four.w;
  } else if constexpr (C == 2) {
    const float2 two = *reinterpret_cast<const float2*>(row);
    w[0] = two.x;
    w[1] = two.y;
  } else {
    w[0] = row[0];
  }
}

// Brings the weights of a token there; the caller synchronises.
template <int C, typename T>
__device__ __forceinline__ void load_weights(float* to, const T* w, int64_t way_stride, int sources,
                                             int threads) {
#pragma unroll
  for (int c = 0; c < C; ++c) {
    for (int j = threadIdx.x; j < sources; j += threads) {
      to[j * kWaysPadded<C> + c] = widen(w[c * way_stride + j]);
    }
  }
}

}  // namespace muddformer::kernels
