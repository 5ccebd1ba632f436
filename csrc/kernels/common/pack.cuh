// Packs: so many neighbouring entries of a row, which one thread loads and stores at once. One
// entry where a row's width or its address does not allow more.
#pragma once

#include "vector.cuh"

namespace muddformer::kernels {

template <typename T, int E>
__device__ __forceinline__ void load_pack(const T* from, float (&to)[E]) {
  constexpr int kBytes = E * static_cast<int>(sizeof(T));
  static_assert(E == 1 || kBytes == 16 || kBytes == 8);
  if constexpr (E == 1) {
    to[0] = widen(__ldg(from));
  } else if constexpr (kBytes == 16) {
    unpack<T>(load_once(from), to);
  } else {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(from));
    unpack_word<T>(bits.x, to);
    unpack_word<T>(bits.y, to + kWord<T>);
  }
}

template <typename T, int E>
__device__ __forceinline__ void store_pack(T* to, const float (&from)[E]) {
  constexpr int kBytes = E * static_cast<int>(sizeof(T));
  static_assert(E == 1 || kBytes == 16 || kBytes == 8);
  if constexpr (E == 1) {
    *to = narrow<T>(from[0]);
  } else if constexpr (kBytes == 16) {
    store_once(to, pack<T>(from));
  } else {
    __stcs(reinterpret_cast<uint2*>(to),
           make_uint2(pack_word<T>(from), pack_word<T>(from + kWord<T>)));
  }
}

// exp(x), as exact as a result of type T can show: of 16 bits the fast form is enough.
template <typename T>
__device__ __forceinline__ float exp_for(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  return __expf(x);
}

}  // namespace muddformer::kernels
