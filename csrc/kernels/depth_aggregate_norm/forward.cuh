// Depth aggregation with normed streams, forward, in one read of each source:
//
//   mix_c = sum_j w[t, c, j] X_j[t, :],   Y_c = norm_c(base + mix_c)   (depth_aggregate_norm.h)
//
// X_j, Y_c, mix, normed [N, D], w [N, C, S], statistics [2, C, N], with a pre weight [2, C + 1, N].
// Sums, statistics and norms in float32 from what is in registers; every output is rounded and
// written once. Where the last source is also base, or is normed itself before it is mixed, it
// comes first.
//
// A block has one token and a chunk of its row, one vector of 16 bytes for each thread. The blocks
// of a row with more than one chunk are a cluster and send each other their sums for the norms. The
// ring of bulk copies alone: there is no path for devices before 9.0.
#pragma once

#include "../common/exchange.cuh"
#include "../common/norm.cuh"
#include "../depth_aggregate/forward.cuh"
#include "launch.h"

namespace muddformer::kernels {

template <typename T, int C>
struct ForwardNormArgs : ForwardArgs<T, C> {
  const void* norm_weight[C];
  const void* norm_bias[C];
  const void* pre_weight;
  T* normed;
  T* mix;
  float* statistics;
  int64_t tokens;
  float eps;
  bool layer;
  bool wide;
  bool post;  // the last way's norm weight is the post weight
  bool add_newest;
};

#if __CUDA_ARCH__ >= 900

// Sums over a row, in the order of its warps and blocks; used once.
template <int N>
struct RowSums {
  float shares[kMaxNormConsumers / 32 * N];
  float parts[kMaxNormBlocks * N];  // of the blocks
  uint64_t sent;

  // Called by one thread; a fence and a barrier of the cluster follow.
  __device__ __forceinline__ void start(int blocks) {
    if (blocks == 1) return;
    open_barrier(&sent, blocks * N * int{sizeof(float)});
  }

  // Called by all consumers; every one gets the sums.
  __device__ __forceinline__ void add_up(float (&values)[N], int consumers, int blocks, int rank) {
    if (blocks == 1) return consumer_sums<N>(values, shares, consumers);
    put_shares<N>(values, shares);
    sync_consumers(consumers);
    if (static_cast<int>(threadIdx.x) < N * blocks) {
      const int n = threadIdx.x % N, block = threadIdx.x / N;
      float sum = 0.0f;
      for (int warp = 0; warp < consumers / 32; ++warp) sum += shares[warp * N + n];
      send(in_block(parts + rank * N + n, block), in_block(&sent, block), sum);
    }
    wait_for_sent(&sent);
    get_sums<N>(parts, blocks, values);
  }
};

#endif  // __CUDA_ARCH__ >= 900

// kNewest: the last source is also base, or is normed itself.
template <typename T, int C, bool kNewest>
__global__ void __launch_bounds__(NormThreads::kForward / 2, 2)
    forward_norm_ring(const __grid_constant__ ForwardNormArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RingBarriers ring;
  __shared__ RowSums<1> newest_squares;
  __shared__ RowSums<C> totals, squares;
  constexpr int V = kVector<T>;
  const int consumers = blockDim.x - 32;
  const int stage_bytes = consumers * 16;
  float* weights = reinterpret_cast<float*>(shared + args.stages * stage_bytes);
  const int64_t token = blockIdx.x / args.chunks;
  const int rank = blockIdx.x % args.chunks;
  const int first_column = rank * consumers * V;
  const bool pre = kNewest && args.pre_weight != nullptr;
  const int others = args.sources - (kNewest ? 1 : 0);

  const bool producer = static_cast<int>(threadIdx.x) == consumers;
  if (producer) {
    newest_squares.start(args.chunks);
    totals.start(args.chunks);
    squares.start(args.chunks);
    ring_init(ring, args.stages, consumers);
  }
  __syncthreads();
  if (args.chunks > 1) announce_barriers();

  RingPlace stage;
  if (static_cast<int>(threadIdx.x) >= consumers) {
    const uint32_t bytes = min(consumers * V, args.dim - first_column) * sizeof(T);
    const auto request = [&](int j) {
      barrier_wait(&ring.empty[stage.index], stage.phase ^ 1);  // at once in the first round
      barrier_expect(&ring.full[stage.index], bytes);
      bulk_copy(shared + stage.index * stage_bytes,
                args.x[j] + token * args.x_stride[j] + first_column, bytes,
                &ring.full[stage.index]);
      stage.advance(args.stages);
    };
    if (!producer) return;
    if (kNewest) request(others);
    for (int j = 0; j < others; ++j) request(j);
    return;
  }
  load_weights<C>(weights, args.w + token * args.w_stride, args.way_stride, args.sources,
                  consumers);
  sync_consumers(consumers);
  if (args.chunks > 1) wait_for_barriers();

  const int column = first_column + threadIdx.x * V;
  const bool active = column < args.dim;
  const int64_t at = token * args.dim + column;
  const auto receive = [&] {
    barrier_wait(&ring.full[stage.index], stage.phase);
    const uint4 bits =
        *reinterpret_cast<const uint4*>(shared + stage.index * stage_bytes + threadIdx.x * 16);
    release(&ring.empty[stage.index]);
    stage.advance(args.stages);
    return active ? bits : uint4{};
  };
  const float scale = 1.0f / static_cast<float>(args.dim);
  const int norms = C + (pre ? 1 : 0);  // of which there are statistics
  const bool writes_statistics = rank == 0 && threadIdx.x == 0;
  float sums[C][V] = {};
  uint4 newest{};
  if constexpr (kNewest) {
    float values[V];
    newest = receive();
    unpack<T>(newest, values);
    if (args.add_newest) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (args.post && c == C - 1) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) sums[c][k] = values[k];
      }
    }
    uint4 mixed = newest;
    if (pre) {
      float square[1] = {};
#pragma unroll
      for (int k = 0; k < V; ++k) square[0] = fmaf(values[k], values[k], square[0]);
      newest_squares.add_up(square, consumers, args.chunks, rank);
      const float r = rsqrtf(square[0] * scale + args.eps);
      if (writes_statistics) {
        args.statistics[C * args.tokens + token] = 0.0f;
        args.statistics[(norms + C) * args.tokens + token] = r;
      }
      if (active) {
        float weight[V];
        load_norm<T>(args.pre_weight, args.wide, column, weight);
        mixed = rms_normed<T>(values, r, weight);
        store_once(args.normed + at, mixed);
      }
    }
    add_source<T, C>(mixed, weights + others * kWaysPadded<C>, sums);
  }
  for (int j = 0; j < others; ++j) {
    add_source<T, C>(receive(), weights + j * kWaysPadded<C>, sums);
  }

  float mean[C] = {};
  float r[C] = {};
  if (args.layer) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < V; ++k) mean[c] += sums[c][k];
    }
    totals.add_up(mean, consumers, args.chunks, rank);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      mean[c] = args.norm_weight[c] != nullptr && !(args.post && c == C - 1) ? mean[c] * scale : 0;
    }
  }
#pragma unroll
  for (int c = 0; active && c < C; ++c) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float centred = sums[c][k] - mean[c];
      r[c] = fmaf(centred, centred, r[c]);
    }
  }
  squares.add_up(r, consumers, args.chunks, rank);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    r[c] = args.norm_weight[c] != nullptr ? rsqrtf(r[c] * scale + args.eps) : 1.0f;
    if (writes_statistics) {
      args.statistics[c * args.tokens + token] = mean[c];
      args.statistics[(norms + c) * args.tokens + token] = r[c];
    }
  }
  if (!active) return;
#pragma unroll
  for (int c = 0; c < C; ++c) {
    const bool post = kNewest && args.post && c == C - 1;
    float values[V];
    if (post) store_once(args.mix + at, pack<T>(sums[c]));
    if (args.norm_weight[c] != nullptr) {
      load_norm<T>(args.norm_weight[c], args.wide, column, values);
#pragma unroll
      for (int k = 0; k < V; ++k) sums[c][k] = (sums[c][k] - mean[c]) * r[c] * values[k];
    }
    if (args.norm_bias[c] != nullptr || post) {
      if (post) {
        unpack<T>(newest, values);
      } else {
        load_norm<T>(args.norm_bias[c], args.wide, column, values);
      }
#pragma unroll
      for (int k = 0; k < V; ++k) sums[c][k] += values[k];
    }
    store_once(args.y[c] + at, pack<T>(sums[c]));
  }
#endif
}

template <typename T, int C, bool kNewest>
cudaError_t forward_norm_ways(const AggregateNormForward& p, cudaStream_t stream) {
  const NormForwardLayout layout(p.dtype, p.dim, p.sources);
  ForwardNormArgs<T, C> args;
  set_forward_args<T, C>(args, p, 0, layout.columns);
  for (int c = 0; c < C; ++c) {
    args.norm_weight[c] = p.norm_weight[c];
    args.norm_bias[c] = p.norm_bias[c];
  }
  args.post = p.post_weight != nullptr;
  if (args.post) args.norm_weight[C - 1] = p.post_weight;
  args.pre_weight = p.pre_weight;
  args.normed = static_cast<T*>(p.normed);
  args.add_newest = p.add_newest;
  args.mix = static_cast<T*>(p.mix);
  args.statistics = p.statistics;
  args.tokens = p.tokens;
  args.eps = p.eps;
  args.layer = p.norm == Norm::Layer;
  args.wide = p.wide;
  args.stages = layout.stages;
  return launch_ring(forward_norm_ring<T, C, kNewest>, args, p.tokens * args.chunks,
                     layout.columns.threads, layout.stage_bytes, weights_bytes<C>(p.sources),
                     stream, args.chunks);
}

template <typename T, bool kNewest>
cudaError_t forward_norm_of(const AggregateNormForward& p, cudaStream_t stream) {
  switch (p.ways) {
    case 1:
      return forward_norm_ways<T, 1, kNewest>(p, stream);
    case 2:
      return forward_norm_ways<T, 2, kNewest>(p, stream);
    case 3:
      return forward_norm_ways<T, 3, kNewest>(p, stream);
    default:
      return forward_norm_ways<T, 4, kNewest>(p, stream);
  }
}

template <typename T>
cudaError_t forward_norm(const AggregateNormForward& p, cudaStream_t stream) {
  return newest_first(p) ? forward_norm_of<T, true>(p, stream)
                         : forward_norm_of<T, false>(p, stream);
}

}  // namespace muddformer::kernels
