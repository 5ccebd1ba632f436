// A block of the backward of backward.cuh: its shared memory, the warp that asks for
// all rows, and the one that brings the weights of the next token and adds up the dot products of
// the last. They keep waiting out of the consumers' way.
#pragma once

#include "launch.h"
#include "partial.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

// What has a fixed place in shared memory; twice where it is of the two tokens under way.
template <int C>
struct NormShared {
  RingBarriers ring;
  uint64_t weights_full[2];  // the weights and statistics have come
  uint64_t sums_full[2];     // the dot products are there, and the weights are not read any more
  uint64_t ways_full;        // dY and Y have come
  uint64_t ways_empty;       // they, and dV, are not read any more
  float shares[2][3][kMaxNormConsumers / 32 * C];  // of <g, n>, sum(g); <g, n> of the last source
  float statistics[2][2 * (C + 1)];
};

// kOneChunk: a row has but one chunk.
template <typename T, int C, bool kNewest, bool kOneChunk>
class NormBlock {
 public:
  __device__ __forceinline__ NormBlock(const BackwardNormArgs<T, C>& arguments,
                                       NormShared<C>& block_shared, unsigned char* memory)
      : args(arguments),
        own(block_shared),
        consumers(blockDim.x - 64),
        row_bytes(consumers * 16),
        chunk(consumers * V),
        pre(kNewest && args.pre_weight != nullptr),
        others(args.sources - (kNewest ? 1 : 0)),
        ring{own.ring, memory, row_bytes, args.stages} {
    const int norm_floats = args.slots * args.dim;
    ways = memory + args.stages * 2 * row_bytes;
    partial = reinterpret_cast<float*>(ways + C * 2 * row_bytes);
    norms = partial + norm_floats;
    held = norms + (args.shared_norms ? norm_floats : 0);
    weights = held + (pre && !kOneChunk ? args.dim : 0);
    sums = weights + 2 * weights_size();
    to_remake = reinterpret_cast<unsigned char*>(sums + 2 * sums_size());
  }

  __device__ __forceinline__ void start() {
    if (static_cast<int>(threadIdx.x) == consumers) {
      for (int i = 0; i < 2; ++i) {
        barrier_init(&own.weights_full[i], 32);
        barrier_init(&own.sums_full[i], consumers);
      }
      barrier_init(&own.ways_full, 1);
      barrier_init(&own.ways_empty, consumers);
      ring_init(own.ring, args.stages, consumers);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < args.dim / V; i += blockDim.x) {
      to_remake[i] = ways_to_remake<T, C>(args, i * V);
    }
    const auto set_slot = [&](int slot, const void* from) {
      if (from == nullptr) return;
#pragma unroll 1
      for (int i = threadIdx.x; i < args.dim; i += blockDim.x) {
        const int at = slot * args.dim + partial_place<T>(i, args.dim);
        partial[at] = 0.0f;
        if (args.shared_norms) norms[at] = norm_entry<T>(from, args.wide, i);
      }
    };
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
      set_slot(args.weight_slot[c], args.norm_weight[c]);
      set_slot(args.bias_slot[c], args.norm_bias[c]);
    }
    set_slot(args.pre_slot, args.pre_weight);
    __syncthreads();
  }

  // One thread asks for all rows. Where a row has more than one chunk, dY and Y come twice, first
  // of all for <g, n>, then with each chunk.
  __device__ __forceinline__ void produce() {
    uint32_t phase = 1;  // of ways_empty: at once in the first round
    const auto request_ways = [&](int64_t token, int column) {
      const uint32_t bytes = bytes_at(column);
      barrier_wait(&own.ways_empty, phase);
      phase ^= 1;
      int rows = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        rows += (args.dy[c] != nullptr ? 1 : 0) + (args.saved[c] != nullptr ? 1 : 0);
      }
      barrier_expect(&own.ways_full, rows * bytes);
#pragma unroll 1
      for (int i = 0; i < 2 * C; ++i) {
        const T* from = i % 2 == 0 ? args.dy[i / 2] : args.saved[i / 2];
        if (from == nullptr) continue;
        bulk_copy(ways + i * row_bytes, from + token * args.dim + column, bytes, &own.ways_full);
      }
    };
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
      const auto request = [&](int j, int column) {
        const T* grad = args.grad_in[j];
        ring.request(source(token, j, column),
                     grad != nullptr ? grad + token * args.dim + column : nullptr,
                     bytes_at(column));
      };
#pragma unroll 1
      for (int column = 0; column < args.dim; column = next_chunk(column))
        request_ways(token, column);
#pragma unroll 1
      for (int column = 0; column < args.dim; column = next_chunk(column)) {
        if (!kOneChunk) request_ways(token, column);
        if (kNewest) request(others, column);
#pragma unroll 1
        for (int j = 0; j < args.deferred; j += 2) {
          ring.request(source(token, j, column),
                       j + 1 < args.deferred ? source(token, j + 1, column) : nullptr,
                       bytes_at(column));
        }
#pragma unroll 1
        for (int j = args.deferred; j < others; ++j) request(j, column);
      }
    }
  }

  __device__ __forceinline__ void help() {
    const int lane = threadIdx.x % 32;
    const auto bring = [&](int64_t token, int buffer) {
      const T* w = args.w + token * args.w_stride;
#pragma unroll 1
      for (int j = lane; j < args.sources; j += 32) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          weights[buffer * weights_size() + j * kWaysPadded<C> + c] =
              widen(w[c * args.way_stride + j]);
        }
      }
      if (lane < (pre ? 2 * (C + 1) : 2 * C)) {
        own.statistics[buffer][lane] = args.statistics[lane * args.tokens + token];
      }
      barrier_arrive(&own.weights_full[buffer]);
    };
    RingPlace buffer;
    bring(blockIdx.x, 0);
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
      const int64_t next = token + gridDim.x;
      if (next < args.tokens) bring(next, buffer.index ^ 1);
      barrier_wait(&own.sums_full[buffer.index], buffer.phase);
      store_dw<T, C>(args, token, sums + buffer.index * sums_size(), consumers / 32, lane, 32);
      buffer.advance(2);
    }
  }

 protected:
  static constexpr int V = kVector<T>;

  __device__ __forceinline__ int weights_size() const { return args.sources * kWaysPadded<C>; }
  __device__ __forceinline__ int sums_size() const { return consumers / 32 * C * args.sources; }
  // Where the chunk after the one at this column starts.
  __device__ __forceinline__ int next_chunk(int column) const {
    return kOneChunk ? args.dim : column + chunk;
  }
  __device__ __forceinline__ uint32_t bytes_at(int column) const {
    return min(chunk, args.dim - column) * sizeof(T);
  }
  __device__ __forceinline__ const T* source(int64_t token, int j, int column) const {
    return args.x[j] + token * args.x_stride[j] + column;
  }

  const BackwardNormArgs<T, C>& args;
  NormShared<C>& own;
  const int consumers;
  const int row_bytes;
  const int chunk;  // columns
  const bool pre;
  const int others;  // sources, but for the last where it comes first
  PairRing ring;
  unsigned char* ways;       // [C][2] rows: dY_c, then dV_c; Y_c, then dY_c of the post way
  float* partial;            // [slots][D]
  float* norms;              // [slots][D], with shared_norms
  float* held;               // [D], with a pre weight and more than one chunk
  float* weights;            // [2][S][C padded]
  float* sums;               // [2][warps][C][S]
  unsigned char* to_remake;  // [D / V]: ways_to_remake()
};

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
