// Sums of N values over the 32 lanes of a warp, several at once: at each step a lane hands half of
// its values to its partner and keeps the sums of the other half, so that 4 values take 6
// shuffles and not 20. The order of the additions is fixed.
#pragma once

namespace muddformer::kernels {

constexpr int halvings(int n) {
  return n % 2 == 0 ? 1 + halvings(n / 2) : 0;
}

// How often N can be halved; a lane ends with N >> kHalvings<N> sums.
template <int N>
inline constexpr int kHalvings = halvings(N);

// Lanes that end with the same sums: the first of each such group has lane % kSharers<N> == 0.
template <int N>
inline constexpr int kSharers = 32 >> kHalvings<N>;

// Leaves in values[0 ..] the sums number first, first + 1, .. and returns first. N is at most 32.
template <int N, typename V, int kDistance = 16>
__device__ __forceinline__ int warp_sums(V* values, int lane) {
  if constexpr (kDistance == 0) {
    return 0;
  } else if constexpr (N % 2 == 0) {
    constexpr int kHalf = N / 2;
    const bool upper = (lane & kDistance) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const V keep = upper ? values[i + kHalf] : values[i];
      const V give = upper ? values[i] : values[i + kHalf];
      values[i] = keep + __shfl_xor_sync(0xffffffffu, give, kDistance);
    }
    return (upper ? kHalf : 0) + warp_sums<kHalf, V, kDistance / 2>(values, lane);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], kDistance);
    return warp_sums<N, V, kDistance / 2>(values, lane);
  }
}

}  // namespace muddformer::kernels
