// Depth aggregation with normed streams, forward, in one read of each source:
//
//   mix_c = sum_j w[t, c, j] X_j[t, :],   Y_c = norm_c(base + mix_c)   (aggregate_norm.h)
//
// X_j, base, Y_c, mix [N, D], w [N, C, S], statistics [2, C, N]. Sums, statistics and norms in
// float32 from what is in registers; every output is rounded and written once.
//
// A block has one token. Its row is walked in chunks of at most 256 vectors of 16 bytes, one for
// each thread; where there is more than one chunk, the sums of all wait in shared memory, each
// thread's own, until the statistics of the row are known. The ring of bulk copies alone: there is
// no path for devices before 9.0.
#pragma once

#include <algorithm>

#include "aggregate_forward.cuh"
#include "aggregate_norm_launch.h"
#include "norm.cuh"

namespace muddformer::kernels {

template <typename T, int C>
struct ForwardNormArgs : ForwardArgs<T, C> {
  const void* norm_weight[C];
  const void* norm_bias[C];
  const T* base;
  T* mix;
  float* statistics;
  int64_t base_stride;
  int64_t tokens;
  float eps;
  bool layer;
  bool wide;
  bool post;  // the last way's norm weight is the post weight
};

// Sums that wait in shared memory.
template <typename T, int C>
__host__ __device__ constexpr int held_float4s(int consumers, int chunks) {
  return chunks == 1 ? 0 : chunks * C * (kVector<T> / 4) * consumers;
}

template <typename T, int C>
__global__ void __launch_bounds__(kRingThreads, kRingBlocks)
    forward_norm_ring(const __grid_constant__ ForwardNormArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RingBarriers ring;
  __shared__ float scratch[2][kMaxConsumers / 32 * C];
  constexpr int V = kVector<T>;
  const int consumers = blockDim.x - 32;
  const int stage_bytes = consumers * 16;
  const int chunk = consumers * V;
  float4* held = reinterpret_cast<float4*>(shared + args.stages * stage_bytes);
  float* weights = reinterpret_cast<float*>(held + held_float4s<T, C>(consumers, args.chunks));
  const int64_t token = blockIdx.x;

  const bool producer = static_cast<int>(threadIdx.x) == consumers;
  if (producer) ring_init(ring, args.stages, consumers);
  __syncthreads();

  RingPlace stage;
  if (static_cast<int>(threadIdx.x) >= consumers) {
    const int rows = args.sources + (args.base != nullptr ? 1 : 0);
    for (int column = 0; producer && column < args.dim; column += chunk) {
      const uint32_t bytes = min(chunk, args.dim - column) * sizeof(T);
      for (int j = 0; j < rows; ++j) {
        const T* row = j < args.sources ? args.x[j] + token * args.x_stride[j]
                                        : args.base + token * args.base_stride;
        barrier_wait(&ring.empty[stage.index], stage.phase ^ 1);  // at once in the first round
        barrier_expect(&ring.full[stage.index], bytes);
        bulk_copy(shared + stage.index * stage_bytes, row + column, bytes, &ring.full[stage.index]);
        stage.advance(args.stages);
      }
    }
    return;
  }
  load_weights<C>(weights, args.w + token * args.w_stride, args.way_stride, args.sources,
                  consumers);
  sync_consumers(consumers);

  float sums[C][V];  // of the last chunk, or of the one that was fetched last
  const auto place = [&](int i, int c, int part) {
    return held + ((i * C + c) * (V / 4) + part) * consumers + threadIdx.x;
  };
  const auto fetch = [&](int i) {
    if (args.chunks == 1) return;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int part = 0; part < V / 4; ++part) {
        const float4 four = *place(i, c, part);
        sums[c][4 * part] = four.x;
        sums[c][4 * part + 1] = four.y;
        sums[c][4 * part + 2] = four.z;
        sums[c][4 * part + 3] = four.w;
      }
    }
  };
  uint4 base{};  // of the last chunk; an earlier one is read again where it is needed
  for (int i = 0; i < args.chunks; ++i) {
    const bool active = i * chunk + static_cast<int>(threadIdx.x) * V < args.dim;
    const auto receive = [&] {
      barrier_wait(&ring.full[stage.index], stage.phase);
      const uint4 bits =
          *reinterpret_cast<const uint4*>(shared + stage.index * stage_bytes + threadIdx.x * 16);
      release(&ring.empty[stage.index]);
      stage.advance(args.stages);
      return active ? bits : uint4{};
    };
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < V; ++k) sums[c][k] = 0.0f;
    }
    for (int j = 0; j < args.sources; ++j) {
      add_source<T, C>(receive(), weights + j * kWaysPadded<C>, sums);
    }
    if (args.base != nullptr) {
      float values[V];
      base = receive();
      unpack<T>(base, values);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (args.post && c == C - 1) continue;
#pragma unroll
        for (int k = 0; k < V; ++k) sums[c][k] += values[k];
      }
    }
    if (args.chunks == 1) break;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int part = 0; part < V / 4; ++part) {
        *place(i, c, part) = make_float4(sums[c][4 * part], sums[c][4 * part + 1],
                                         sums[c][4 * part + 2], sums[c][4 * part + 3]);
      }
    }
  }

  const float scale = 1.0f / static_cast<float>(args.dim);
  float mean[C] = {};
  float r[C] = {};
  if (args.layer) {
    for (int i = 0; i < args.chunks; ++i) {
      fetch(i);
#pragma unroll
      for (int c = 0; c < C; ++c) {
#pragma unroll
        for (int k = 0; k < V; ++k) mean[c] += sums[c][k];
      }
    }
    consumer_sums<C>(mean, scratch[0], consumers);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      mean[c] = args.norm_weight[c] != nullptr && !(args.post && c == C - 1) ? mean[c] * scale : 0;
    }
  }
  for (int i = 0; i < args.chunks; ++i) {
    fetch(i);
    if (i * chunk + static_cast<int>(threadIdx.x) * V >= args.dim) break;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float centred = sums[c][k] - mean[c];
        r[c] = fmaf(centred, centred, r[c]);
      }
    }
  }
  consumer_sums<C>(r, scratch[1], consumers);
#pragma unroll
  for (int c = 0; c < C; ++c) {
    r[c] = args.norm_weight[c] != nullptr ? rsqrtf(r[c] * scale + args.eps) : 1.0f;
    if (threadIdx.x == 0) {
      args.statistics[c * args.tokens + token] = mean[c];
      args.statistics[(C + c) * args.tokens + token] = r[c];
    }
  }

  for (int i = 0; i < args.chunks; ++i) {
    const int column = i * chunk + threadIdx.x * V;
    if (column >= args.dim) break;
    fetch(i);
    const int64_t at = token * args.dim + column;
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const bool post = args.post && c == C - 1;
      float values[V];
      if (post) store_once(args.mix + at, pack<T>(sums[c]));
      if (args.norm_weight[c] != nullptr) {
        load_norm<T>(args.norm_weight[c], args.wide, column, values);
#pragma unroll
        for (int k = 0; k < V; ++k) sums[c][k] = (sums[c][k] - mean[c]) * r[c] * values[k];
      }
      if (args.norm_bias[c] != nullptr || post) {
        if (post) {
          if (args.chunks > 1) base = load_once(args.base + token * args.base_stride + column);
          unpack<T>(base, values);
        } else {
          load_norm<T>(args.norm_bias[c], args.wide, column, values);
        }
#pragma unroll
        for (int k = 0; k < V; ++k) sums[c][k] += values[k];
      }
      store_once(args.y[c] + at, pack<T>(sums[c]));
    }
  }
#endif
}

template <typename T, int C>
cudaError_t forward_norm_ways(const AggregateNormForward& p, cudaStream_t stream) {
  const Columns columns = split_columns(static_cast<int>(p.dim) / kVector<T>);
  ForwardNormArgs<T, C> args;
  set_forward_args<T, C>(args, p, 0, columns);
  for (int c = 0; c < C; ++c) {
    args.norm_weight[c] = p.norm_weight[c];
    args.norm_bias[c] = p.norm_bias[c];
  }
  args.post = p.post_weight != nullptr;
  if (args.post) args.norm_weight[C - 1] = p.post_weight;
  args.base = static_cast<const T*>(p.base);
  args.base_stride = p.base_stride;
  args.mix = static_cast<T*>(p.mix);
  args.statistics = p.statistics;
  args.tokens = p.tokens;
  args.eps = p.eps;
  args.layer = p.norm == Norm::Layer;
  args.wide = p.wide;
  const int stage_bytes = columns.threads * 16;
  args.stages = ring_stages(columns.threads, stage_bytes, kForwardBytesInFlight);
  const int held_bytes = held_float4s<T, C>(columns.threads, columns.chunks) * 16;
  return launch_ring(forward_norm_ring<T, C>, args, p.tokens, columns.threads, stage_bytes,
                     held_bytes + weights_bytes<C>(p.sources), stream);
}

template <typename T>
cudaError_t forward_norm(const AggregateNormForward& p, cudaStream_t stream) {
  switch (p.ways) {
    case 1:
      return forward_norm_ways<T, 1>(p, stream);
    case 2:
      return forward_norm_ways<T, 2>(p, stream);
    case 3:
      return forward_norm_ways<T, 3>(p, stream);
    default:
      return forward_norm_ways<T, 4>(p, stream);
  }
}

}  // namespace muddformer::kernels
