// How heads are split over lanes and blocks, and what lanes load, for qk_norm_rotary.cu.
#pragma once

#include "../common/pack.cuh"
#include "qk_norm_rotary.h"

namespace muddformer::kernels {

// How a kernel is launched; these were the fastest of those tried on an H200.
struct HeadLaunch {
  int threads;  // of a block
  int blocks;   // of a multiprocessor
  int heads;    // of a lane
};

template <bool kNorm>
inline constexpr HeadLaunch kForward = kNorm ? HeadLaunch{128, 5, 4} : HeadLaunch{256, 3, 2};
inline constexpr HeadLaunch kBackward{256, 2, 2};
inline constexpr int kStages = 2;  // of the backward

// How the heads of queries or of keys are split over lanes and blocks.
struct Split {
  int lanes;        // of a head
  int warp_items;   // heads side by side in a warp
  int lane_packs;   // pairs of packs of a head
  uint32_t groups;  // lanes' shares of a token: heads / heads of a lane, rounded up
  uint32_t items;   // of all tokens
  uint32_t blocks;  // that take them
};

struct Splits {
  Split of[2];
};

// The two packs of a pair, in entries of the head, and whether they are rotated.
struct Pair {
  int first, second;
  bool rotated;
};

template <int P>
__device__ __forceinline__ Pair pair_of(int pair, int half) {
  const int begin = pair * P;
  if (begin < half) return {begin, begin + half, true};
  return {2 * begin, 2 * begin + P, false};
}

// The place of an item: its token, and the first of its heads, which are `groups` apart.
struct Item {
  int64_t batch, token;
  int head;
};

__device__ __forceinline__ Item item_of(uint32_t item, uint32_t groups, uint32_t tokens) {
  const uint32_t token = item / groups, batch = token / tokens;
  return {batch, token - batch * tokens, static_cast<int>(item - token * groups)};
}

// Which of its block's items this lane has. Lanes that are left over have one that is not there.
__device__ __forceinline__ uint64_t item_in_block(const Split& split) {
  const int place = threadIdx.x % 32 / split.lanes;
  return place < split.warp_items ? threadIdx.x / 32 * split.warp_items + place : split.items;
}

template <typename T>
__device__ __forceinline__ T* head_at(const Heads& heads, const Item& at, int head) {
  return static_cast<T*>(heads.data) + at.batch * heads.batch_stride +
         at.token * heads.token_stride + head * heads.head_stride;
}

// Cosines and sines of this lane's pairs.
template <int P, int V>
struct Angles {
  float cos[V][P], sin[V][P];

  __device__ __forceinline__ void load(const QkNormRotary& p, const Item& at, int lane, int lanes) {
    const int64_t row = at.batch * p.rotary_batch_stride + at.token * p.rotary_token_stride;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const int begin = (lane + k * lanes) * P;
      if (begin < p.half) {
        load_floats<P>(p.cos + row + begin, cos[k]);
        load_floats<P>(p.sin + row + begin, sin[k]);
      } else {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          cos[k][i] = 1.0f;
          sin[k][i] = 0.0f;
        }
      }
    }
  }
};

// A norm's weight for this lane's pairs.
template <typename T, int P, int V>
__device__ __forceinline__ void load_weight(const QkNormRotary& p, int which, int lane, int lanes,
                                            int pairs, float (&first)[V][P],
                                            float (&second)[V][P]) {
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const Pair pair = pair_of<P>(min(lane + k * lanes, pairs - 1), p.half);
    load_parameter<T, P>(p.weight[which], p.wide, pair.first, first[k]);
    load_parameter<T, P>(p.weight[which], p.wide, pair.second, second[k]);
  }
}

// Sum over the lanes of a head, equal in each of them. Every lane of the warp calls it.
// kHalves: the lanes are a power of two.
template <bool kHalves>
__device__ __forceinline__ float lane_sum(float value, int lane, int lanes) {
  if constexpr (kHalves) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
  } else {
    const int first = threadIdx.x % 32 - lane;
    float sum = 0.0f;
    for (int i = 0; i < lanes; ++i) sum += __shfl_sync(0xffffffffu, value, first + i);
    return sum;
  }
}

}  // namespace muddformer::kernels
