// Packs: so many neighbouring entries of a row, which one thread loads and stores at once. One
// entry where a row's width or its address does not allow more.
#pragma once

#include "shared_memory.cuh"
#include "vector.cuh"

namespace muddformer::kernels {

// A pack as it lies in memory.
template <typename T, int E>
using PackBits =
    std::conditional_t<E == 1, T, std::conditional_t<E * sizeof(T) == 16, uint4, uint2>>;

template <typename T, int E>
__device__ __forceinline__ PackBits<T, E> load_bits(const T* from) {
  static_assert(E == 1 || E * sizeof(T) == 16 || E * sizeof(T) == 8);
  if constexpr (E == 1) {
    return __ldg(from);
  } else if constexpr (E * sizeof(T) == 16) {
    return load_once(from);
  } else {
    return __ldcs(reinterpret_cast<const uint2*>(from));
  }
}

// Into this thread's own place in shared memory; packs of more than one entry come asynchronously.
template <typename T, int E>
__device__ __forceinline__ void copy_bits(PackBits<T, E>* to, const T* from) {
  if constexpr (E == 1) {
    *to = __ldg(from);
  } else {
    copy_async<E * sizeof(T)>(shared_address(to), from);
  }
}

template <typename T, int E>
__device__ __forceinline__ void unpack_bits(const PackBits<T, E>& bits, float (&to)[E]) {
  if constexpr (E == 1) {
    to[0] = widen(bits);
  } else if constexpr (E * sizeof(T) == 16) {
    unpack<T>(bits, to);
  } else {
    unpack_word<T>(bits.x, to);
    unpack_word<T>(bits.y, to + kWord<T>);
  }
}

template <typename T, int E>
__device__ __forceinline__ PackBits<T, E> pack_bits(const float (&from)[E]) {
  if constexpr (E == 1) {
    return narrow<T>(from[0]);
  } else if constexpr (E * sizeof(T) == 16) {
    return pack<T>(from);
  } else {
    return make_uint2(pack_word<T>(from), pack_word<T>(from + kWord<T>));
  }
}

template <typename T, int E>
__device__ __forceinline__ void store_bits(T* to, const PackBits<T, E>& bits) {
  if constexpr (E == 1) {
    *to = bits;
  } else {
    __stcs(reinterpret_cast<PackBits<T, E>*>(to), bits);
  }
}

template <typename T, int E>
__device__ __forceinline__ void load_pack(const T* from, float (&to)[E]) {
  unpack_bits<T, E>(load_bits<T, E>(from), to);
}

template <typename T, int E>
__device__ __forceinline__ void store_pack(T* to, const float (&from)[E]) {
  store_bits<T, E>(to, pack_bits<T, E>(from));
}

// E floats, which stay in the caches.
template <int E>
__device__ __forceinline__ void load_floats(const float* from, float (&to)[E]) {
  if constexpr (E == 1) {
    to[0] = __ldg(from);
  } else {
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
      to[i] = four.x;
      to[i + 1] = four.y;
      to[i + 2] = four.z;
      to[i + 3] = four.w;
    }
  }
}

template <int E>
__device__ __forceinline__ void store_floats(float* to, const float (&from)[E]) {
  if constexpr (E == 1) {
    to[0] = from[0];
  } else {
#pragma unroll
    for (int i = 0; i < E; i += 4) {
      *reinterpret_cast<float4*>(to + i) =
          make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
    }
  }
}

// A pack of a norm's weight or bias, which is float32 (wide) or of type T: it stays in the caches.
template <typename T, int E>
__device__ __forceinline__ void load_parameter(const void* from, bool wide, int column,
                                               float (&to)[E]) {
  if (std::is_same_v<T, float> || wide) {
    load_floats<E>(static_cast<const float*>(from) + column, to);
  } else if constexpr (E == 1) {
    to[0] = widen(__ldg(static_cast<const T*>(from) + column));
  } else if constexpr (E == kVector<T>) {
    unpack<T>(__ldg(reinterpret_cast<const uint4*>(static_cast<const T*>(from) + column)), to);
  }
}

// exp(x), as exact as a result of type T can show: of 16 bits the fast form is enough.
template <typename T>
__device__ __forceinline__ float exp_for(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  return __expf(x);
}

}  // namespace muddformer::kernels
