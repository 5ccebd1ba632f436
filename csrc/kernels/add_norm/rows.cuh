// How rows are split over threads: a group of threads (threadIdx.x) has a row, each of them up to V
// packs of E entries that lie a group's width apart; a block has several groups (threadIdx.y).
#pragma once

#include <cstdint>

#include "../common/pack.cuh"

namespace muddformer::kernels {

struct Groups {
  int packs_each;  // V
  int threads;     // of a group: whole warps
  int rows;        // groups of a block
};

inline constexpr int kMaxGroup = 512;      // threads; each may then have 128 registers
inline constexpr int kMaxWarps = 32;       // of a block
inline constexpr int kNamedBarriers = 15;  // that a block has beside that of __syncthreads

// The split with the fewest idle threads, and of those the one with the most packs a thread, which
// are all under way at once. usual: packs of a thread at most, where the row is not too wide for
// that; then they are `most`. most_threads: of a block.
constexpr Groups split_rows(int packs, int usual, int most, int most_threads) {
  Groups best{0, 0, 0};
  const auto consider = [&](int each) {
    const int threads = ((packs + each - 1) / each + 31) / 32 * 32;
    if (threads > kMaxGroup) return;
    if (best.packs_each == 0 || threads * each < best.threads * best.packs_each) {
      best = {each, threads, 0};
    }
  };
  for (int each = usual; each > 0; each /= 2) consider(each);
  if (best.packs_each == 0) consider(most);
  if (best.packs_each == 0) return best;  // the row is too wide
  // With more packs a thread has more registers.
  const int block = best.packs_each > usual ? kMaxGroup : most_threads;
  const int groups = block / best.threads < 1 ? 1 : block / best.threads;
  best.rows = best.threads > 32 && groups > kNamedBarriers ? kNamedBarriers : groups;
  return best;
}

// Sums of N values over the threads of a group; every thread gets them. Groups of more than one
// warp meet at a barrier of their own. turn: 0 at first, kept from call to call.
template <int N>
__device__ __forceinline__ void group_sums(float (&values)[N], int& turn) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      values[i] += __shfl_xor_sync(0xffffffffu, values[i], distance);
    }
  }
  if (blockDim.x == 32) return;
  // In turns, so that nobody writes where another still reads the last sums.
  __shared__ float shares[2][kMaxWarps][N];
  const int warps = blockDim.x / 32;
  float (*const own)[N] = shares[turn] + threadIdx.y * warps;
  turn ^= 1;
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) own[threadIdx.x / 32][i] = values[i];
  }
  asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.y + 1), "r"(blockDim.x) : "memory");
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0.0f;
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += own[warp][i];
  }
}

}  // namespace muddformer::kernels
