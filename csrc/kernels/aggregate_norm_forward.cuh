// Depth aggregation with normed streams, forward, in one read of each source:
//
//   mix_c = sum_j w[t, c, j] X_j[t, :],   Y_c = norm_c(base + mix_c)   (aggregate_norm.h)
//
// X_j, Y_c, mix, normed [N, D], w [N, C, S], statistics [2, C, N], with a pre weight [2, C + 1, N].
// Sums, statistics and norms in float32 from what is in registers; every output is rounded and
// written once. Where the last source is also base, or is normed itself before it is mixed, it
// comes first.
//
// A block has one token. Its row is walked in chunks of at most 512 vectors of 16 bytes, one for
// each thread; where there is more than one chunk, the sums of all wait in shared memory, each
// thread's own, until the statistics of the row are known. The ring of bulk copies alone: there is
// no path for devices before 9.0.
#pragma once

#include "aggregate_forward.cuh"
#include "aggregate_norm_launch.h"
#include "norm.cuh"

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

// kNewest: the last source is also base, or is normed itself.
template <typename T, int C, bool kNewest, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    forward_norm_ring(const __grid_constant__ ForwardNormArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RingBarriers ring;
  __shared__ float scratch[3][kMaxNormConsumers / 32 * C];
  constexpr int V = kVector<T>;
  const int consumers = blockDim.x - 32;
  const int stage_bytes = consumers * 16;
  const int chunk = consumers * V;
  float4* held = reinterpret_cast<float4*>(shared + args.stages * stage_bytes);
  float* weights = reinterpret_cast<float*>(
      held + static_cast<int>(held_float4s(C, V, {args.chunks, consumers})));
  const int64_t token = blockIdx.x;
  const bool pre = kNewest && args.pre_weight != nullptr;
  const int others = args.sources - (kNewest ? 1 : 0);

  const bool producer = static_cast<int>(threadIdx.x) == consumers;
  if (producer) ring_init(ring, args.stages, consumers);
  __syncthreads();

  RingPlace stage;
  if (static_cast<int>(threadIdx.x) >= consumers) {
    const auto request = [&](int j, int column) {
      const uint32_t bytes = min(chunk, args.dim - column) * sizeof(T);
      barrier_wait(&ring.empty[stage.index], stage.phase ^ 1);  // at once in the first round
      barrier_expect(&ring.full[stage.index], bytes);
      bulk_copy(shared + stage.index * stage_bytes, args.x[j] + token * args.x_stride[j] + column,
                bytes, &ring.full[stage.index]);
      stage.advance(args.stages);
    };
    if (!producer) return;
    for (int column = 0; pre && column < args.dim; column += chunk) request(others, column);
    for (int column = 0; column < args.dim; column += chunk) {
      if (kNewest && !(pre && args.chunks == 1)) request(others, column);
      for (int j = 0; j < others; ++j) request(j, column);
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
  const auto receive = [&](bool active) {
    barrier_wait(&ring.full[stage.index], stage.phase);
    const uint4 bits =
        *reinterpret_cast<const uint4*>(shared + stage.index * stage_bytes + threadIdx.x * 16);
    release(&ring.empty[stage.index]);
    stage.advance(args.stages);
    return active ? bits : uint4{};
  };
  const float scale = 1.0f / static_cast<float>(args.dim);
  const int norms = C + (pre ? 1 : 0);  // of which there are statistics
  uint4 newest{};  // of the last chunk; an earlier one is read again where it is needed
  float newest_r = 1.0f;
  if (pre) {
    float square[1] = {};
    for (int i = 0; i < args.chunks; ++i) {
      float values[V];
      newest = receive(i * chunk + static_cast<int>(threadIdx.x) * V < args.dim);
      unpack<T>(newest, values);
#pragma unroll
      for (int k = 0; k < V; ++k) square[0] = fmaf(values[k], values[k], square[0]);
    }
    consumer_sums<1>(square, scratch[2], consumers);
    newest_r = rsqrtf(square[0] * scale + args.eps);
    if (threadIdx.x == 0) {
      args.statistics[C * args.tokens + token] = 0.0f;
      args.statistics[(norms + C) * args.tokens + token] = newest_r;
    }
  }
  for (int i = 0; i < args.chunks; ++i) {
    const int column = i * chunk + threadIdx.x * V;
    const bool active = column < args.dim;
#pragma unroll
    for (int c = 0; c < C; ++c) {
#pragma unroll
      for (int k = 0; k < V; ++k) sums[c][k] = 0.0f;
    }
    if constexpr (kNewest) {
      float values[V];
      if (!(pre && args.chunks == 1)) newest = receive(active);
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
      if (pre && active) {
        float weight[V];
        load_norm<T>(args.pre_weight, args.wide, column, weight);
        mixed = rms_normed<T>(values, newest_r, weight);
        store_once(args.normed + token * args.dim + column, mixed);
      }
      add_source<T, C>(mixed, weights + others * kWaysPadded<C>, sums);
    }
    for (int j = 0; j < others; ++j) {
      add_source<T, C>(receive(active), weights + j * kWaysPadded<C>, sums);
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
      args.statistics[(norms + c) * args.tokens + token] = r[c];
    }
  }

  for (int i = 0; i < args.chunks; ++i) {
    const int column = i * chunk + threadIdx.x * V;
    if (column >= args.dim) break;
    fetch(i);
    const int64_t at = token * args.dim + column;
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
          if (args.chunks > 1) {
            newest = load_once(args.x[others] + token * args.x_stride[others] + column);
          }
          unpack<T>(newest, values);
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

template <typename T, int C, bool kNewest>
cudaError_t forward_norm_ways(const AggregateNormForward& p, cudaStream_t stream) {
  const NormForwardLayout layout(p);
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
  const auto launch = [&](auto* kernel) {
    return launch_ring(kernel, args, p.tokens, layout.columns.threads, layout.stage_bytes,
                       static_cast<int>(layout.held_bytes) + weights_bytes<C>(p.sources), stream);
  };
  return layout.roomy ? launch(forward_norm_ring<T, C, kNewest, NormThreads::kForwardRoomy>)
                      : launch(forward_norm_ring<T, C, kNewest, NormThreads::kForward>);
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
