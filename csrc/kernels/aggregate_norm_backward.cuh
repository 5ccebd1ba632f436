// Depth aggregation with normed streams, chained backward, in one pass over the history:
//
//   n        = (Y_c - bias) / weight                  of a normed way (aggregate_norm.h)
//            = mix_c * r                              of the last way, with a post weight
//   dV_c     = r (g - n <g, n> / D [- mean(g)])       g = dY_c * weight; [] for LayerNorm
//            = dY_c                                   of a way without a norm
//   dX_j     = G_j + sum_c w[t, c, j] dV_c            dw[t, c, j] = <dV_c, X_j>
//   dweight  = sum_t dY_c n,   dbias = sum_t dY_c
//
// The last source has more to its gradient. It comes first, while dV_c is at hand:
//
//   dbase    = sum_c dV_c                             the post way gives dY_c instead of dV_c
//   dX_j     = dbase + G_j + ..                       where it is base
//            = [dbase +] r (g - n <g, n> / D)         where it was normed, n = X_j r, before it was
//                                                     mixed: g = (G_j + ..) * pre_weight
//   dpre_weight = sum_t (G_j + ..) n
//
// X_j, G_j, dX_j, dY_c, Y_c, mix [N, D], w and dw [N, C, S]. Every tensor is read or written once
// (dY, Y and a normed X_j twice where a row has more than one chunk); float32 sums, rounded once.
//
// dV_c is written where it is asked for: the factors of the deferred sources (deferred_flush.h).
//
// Work is split as in aggregate_backward.cuh, but the blocks stay and walk over the tokens: each
// keeps the sums over its tokens for these and dbias in shared memory, every thread those of its
// own columns. They are added over the blocks, in fixed order, by sum_partials (aggregate_norm.cu).
// A stage of the ring holds X_j and G_j, or dY_c and Y_c. Two more warps keep waiting out of the
// consumers' way: the producer of the ring, and a helper that brings the weights of the next token
// and adds up the dot products of the last.
#pragma once

#include "aggregate_norm_launch.h"
#include "aggregate_norm_partial.cuh"

namespace muddformer::kernels {

// What the warps tell each other about the two tokens under way.
struct TokenBarriers {
  uint64_t weights[2];  // the weights and statistics have come
  uint64_t sums[2];     // the dot products are there, and the weights are not read any more
};

// Which norm weights a kernel is for: any, some too small to divide by, none too small. The path
// for small weights costs registers even where it is not taken. With kNewest, where they are short,
// two kernels are launched instead of one, of which one ends at once.
enum class Remake { Any, Some, None };

// kNewest: the last source has more to its gradient.
template <typename T, int C, bool kNewest, Remake kRemake>
__global__ void __launch_bounds__(kNormThreads, kNormBlocks)
    backward_norm_ring(const __grid_constant__ BackwardNormArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  constexpr int V = kVector<T>;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RingBarriers barriers;
  __shared__ TokenBarriers tokens;
  __shared__ float scratch[2][3][kMaxConsumers / 32 * C];  // of two tokens
  __shared__ float statistics[2][2 * (C + 1)];
  const int consumers = blockDim.x - 64;
  const int row_bytes = consumers * 16;
  const int stage_bytes = 2 * row_bytes;
  const int chunk = consumers * V;
  const bool one_chunk = args.dim <= chunk;
  const int sources = args.sources;
  const bool pre = kNewest && args.pre_weight != nullptr;
  const int others = sources - (kNewest ? 1 : 0);
  const int norm_floats = args.slots * args.dim;
  const int weights_size = sources * kWaysPadded<C>;
  const int sums_size = consumers / 32 * C * sources;
  float* partial = reinterpret_cast<float*>(shared + args.stages * stage_bytes);
  float* norms = partial + norm_floats;
  // With a pre weight and more than one chunk: the last source's gradient, but for its part along
  // n.
  float* held = norms + (args.shared_norms ? norm_floats : 0);
  float* weights = held + (pre && !one_chunk ? args.dim : 0);  // of two tokens
  float* sums = weights + 2 * weights_size;                    // of two tokens
  // For every vector of a row, the ways that ways_to_remake() finds there.
  auto* to_remake = reinterpret_cast<unsigned char*>(sums + 2 * sums_size);

  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (static_cast<int>(threadIdx.x) == consumers) {
    for (int i = 0; i < 2; ++i) {
      barrier_init(&tokens.weights[i], 32);
      barrier_init(&tokens.sums[i], consumers);
    }
    ring_init(barriers, args.stages, consumers);
  }
  bool some = false;
#pragma unroll 1
  for (int i = threadIdx.x; i < args.dim / V; i += blockDim.x) {
    to_remake[i] = ways_to_remake<T, C>(args, i * V);
    some |= to_remake[i] != 0;
  }
  if (kRemake != Remake::Any && (__syncthreads_or(some) != 0) != (kRemake == Remake::Some)) return;
#pragma unroll 1
  for (int c = 0; c < C; ++c) {
#pragma unroll 1
    for (int i = threadIdx.x; i < args.dim; i += blockDim.x) {
      const int place = partial_place<T>(i, args.dim);
      if (args.norm_weight[c] != nullptr) {
        const int at = args.weight_slot[c] * args.dim + place;
        partial[at] = 0.0f;
        if (args.shared_norms) norms[at] = norm_entry<T>(args.norm_weight[c], args.wide, i);
      }
      if (args.norm_bias[c] != nullptr) {
        const int at = args.bias_slot[c] * args.dim + place;
        partial[at] = 0.0f;
        if (args.shared_norms) norms[at] = norm_entry<T>(args.norm_bias[c], args.wide, i);
      }
    }
  }
#pragma unroll 1
  for (int i = threadIdx.x; pre && i < args.dim; i += blockDim.x) {
    const int at = args.pre_slot * args.dim + partial_place<T>(i, args.dim);
    partial[at] = 0.0f;
    if (args.shared_norms) norms[at] = norm_entry<T>(args.pre_weight, args.wide, i);
  }
  __syncthreads();

  PairRing ring{barriers, shared, row_bytes, args.stages};
  if (warp == consumers / 32) {
    if (lane != 0) return;
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
      const int64_t row = token * args.dim;
      const auto request_ways = [&](int column) {
        const uint32_t bytes = min(chunk, args.dim - column) * sizeof(T);
#pragma unroll 1
        for (int c = 0; c < C; ++c) {
          ring.request(args.dy[c] != nullptr ? args.dy[c] + row + column : nullptr,
                       args.saved[c] != nullptr ? args.saved[c] + row + column : nullptr, bytes);
        }
      };
#pragma unroll 1
      for (int column = 0; column < args.dim; column += chunk) request_ways(column);
#pragma unroll 1
      for (int column = 0; column < args.dim; column += chunk) {
        const uint32_t bytes = min(chunk, args.dim - column) * sizeof(T);
        if (!one_chunk) request_ways(column);
        const auto source = [&](int j) { return args.x[j] + token * args.x_stride[j] + column; };
        const auto request_source = [&](int j) {
          ring.request(source(j),
                       args.grad_in[j] != nullptr ? args.grad_in[j] + row + column : nullptr,
                       bytes);
        };
        if (kNewest) request_source(others);
#pragma unroll 1
        for (int j = 0; j < args.deferred; j += 2) {
          ring.request(source(j), j + 1 < args.deferred ? source(j + 1) : nullptr, bytes);
        }
#pragma unroll 1
        for (int j = args.deferred; j < others; ++j) request_source(j);
      }
    }
    return;
  }

  if (warp > consumers / 32) {
    const auto bring = [&](int64_t token, int buffer) {
      const T* w = args.w + token * args.w_stride;
#pragma unroll 1
      for (int j = lane; j < sources; j += 32) {
#pragma unroll
        for (int c = 0; c < C; ++c) {
          weights[buffer * weights_size + j * kWaysPadded<C> + c] =
              widen(w[c * args.way_stride + j]);
        }
      }
      if (lane < (pre ? 2 * (C + 1) : 2 * C)) {
        statistics[buffer][lane] = args.statistics[lane * args.tokens + token];
      }
      barrier_arrive(&tokens.weights[buffer]);
    };
    RingPlace buffer;
    bring(blockIdx.x, 0);
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
      const int64_t next = token + gridDim.x;
      if (next < args.tokens) bring(next, buffer.index ^ 1);
      barrier_wait(&tokens.sums[buffer.index], buffer.phase);
      store_dw<T, C>(args, token, sums + buffer.index * sums_size, consumers / 32, lane, 32);
      buffer.advance(2);
    }
    return;
  }

  // A vector of a norm's weight or bias.
  const auto norm_values = [&](int slot, const void* from, int column, float (&to)[V]) {
    if (!args.shared_norms) {
      load_norm<T>(from, args.wide, column, to);
      return;
    }
    get_floats<T>(norms + slot * args.dim, column, args.dim, to);
  };
  const float scale = 1.0f / static_cast<float>(args.dim);
  RingPlace buffer;
  for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
    const int64_t row = token * args.dim;
    const float* own_weights = weights + buffer.index * weights_size;
    float* own_sums = sums + buffer.index * sums_size + warp * C * sources;
    const float* mean = statistics[buffer.index];
    const float* r = statistics[buffer.index] + (pre ? C + 1 : C);
    const auto newest_r = [&] { return pre ? r[C] : 1.0f; };
    const auto newest_slope = [&] { return scale * newest_r() * newest_r(); };
    uint4 dv[C];  // dY_c, then dV_c
    uint4 saved[C];
    const auto receive_ways = [&](bool active) {
#pragma unroll
      for (int c = 0; c < C; ++c) {
        ring.receive(active && args.dy[c] != nullptr, active && args.saved[c] != nullptr, dv[c],
                     saved[c]);
      }
    };

    barrier_wait(&tokens.weights[buffer.index], buffer.phase);

    // <g, n> and sum(g) of the whole row.
    float along[C] = {};
    float total[C] = {};
    for (int first_column = 0; first_column < args.dim; first_column += chunk) {
      const int column = first_column + threadIdx.x * V;
      const bool active = column < args.dim;
      receive_ways(active);
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (!active || args.saved[c] == nullptr) continue;
        const bool post = kNewest && args.post && c == C - 1;
        float dy[V];
        float y[V];
        float value[V];
        unpack<T>(dv[c], dy);
        unpack<T>(saved[c], y);
        if (post || args.layer) {
          norm_values(args.weight_slot[c], args.norm_weight[c], column, value);
#pragma unroll
          for (int i = 0; i < V; ++i) {
            total[c] = fmaf(dy[i], value[i], total[c]);
            if (post) dy[i] *= value[i] * r[c];
          }
        }
        if (args.norm_bias[c] != nullptr) {
          norm_values(args.bias_slot[c], args.norm_bias[c], column, value);
#pragma unroll
          for (int i = 0; i < V; ++i) y[i] -= value[i];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) along[c] = fmaf(dy[i], y[i], along[c]);
      }
    }
    consumer_sums<C>(along, scratch[buffer.index][0], consumers);
    if (args.layer) consumer_sums<C>(total, scratch[buffer.index][1], consumers);

    float newest_along[1] = {};  // <g, n> of the last source
    for (int first_column = 0; first_column < args.dim; first_column += chunk) {
      const int column = first_column + threadIdx.x * V;
      const bool active = column < args.dim;
      if (!one_chunk) receive_ways(active);
      const unsigned remade = kRemake != Remake::None && active ? to_remake[column / V] : 0;
#pragma unroll
      for (int c = 0; c < C; ++c) {
        if (!active) continue;
        const bool post = kNewest && args.post && c == C - 1;
        float dy[V];
        unpack<T>(dv[c], dy);
        if (args.saved[c] != nullptr) {
          float n[V];
          float weight[V];
          norm_values(args.weight_slot[c], args.norm_weight[c], column, weight);
          if (args.norm_bias[c] != nullptr) {
            add_partial<T>(partial + args.bias_slot[c] * args.dim, column, args.dim, dy);
          }
          if ((remade >> c & 1) != 0) {
            float words[V];  // in local memory
#pragma unroll 1
            for (int i = 0; i < V; i += kWord<T>) {
              remake_normed<T, C, kNewest>(args, own_weights, c, token, column + i, mean[c], r[c],
                                           newest_r(), words + i);
            }
#pragma unroll
            for (int i = 0; i < V; ++i) n[i] = words[i];
          } else {
            unpack<T>(saved[c], n);
            if (args.norm_bias[c] != nullptr) {
              float bias[V];
              norm_values(args.bias_slot[c], args.norm_bias[c], column, bias);
#pragma unroll
              for (int i = 0; i < V; ++i) n[i] -= bias[i];
            }
#pragma unroll
            for (int i = 0; i < V; ++i) n[i] *= post ? r[c] : reciprocal(weight[i]);
          }
          const float shift = args.layer && !post ? total[c] * scale : 0.0f;
          const float slope = along[c] * scale;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float g = fmaf(dy[i], weight[i], -shift);
            weight[i] = dy[i] * n[i];
            dy[i] = r[c] * fmaf(-slope, n[i], g);
          }
          add_partial<T>(partial + args.weight_slot[c] * args.dim, column, args.dim, weight);
          if (kNewest && post) saved[c] = dv[c];  // dY_c
          dv[c] = pack<T>(dy);
          if (args.dv[c] != nullptr) store_once(args.dv[c] + row + column, dv[c]);
        }
      }
      if constexpr (kNewest) {
        uint4 x;
        uint4 grad;
        float dots[C];
        float weight[V];
        float result[V];
        ring.receive(active, active && args.grad_in[others] != nullptr, x, grad);
#pragma unroll
        for (int i = 0; i < V; ++i) weight[i] = 1.0f;
        if (pre && active) norm_values(args.pre_slot, args.pre_weight, column, weight);
        chain_newest<T, C>(x, grad, dv, saved[C - 1], own_weights + others * kWaysPadded<C>,
                           newest_r(), args.add_newest, args.post, weight, dots, newest_along[0],
                           result);
        keep_dots<C, 1>(dots, own_sums, sources, others, sources, first_column != 0);
        if (pre && active) {
          add_partial<T>(partial + args.pre_slot * args.dim, column, args.dim, weight);
        }
        if (pre && one_chunk) {
          consumer_sums<1>(newest_along, scratch[buffer.index][2], consumers);
          subtract_along<T>(x, newest_along[0] * newest_slope(), result);
        }
        if (active && pre && !one_chunk) {
          put_floats<T>(held, column, args.dim, result);
        } else if (active && args.grad_out[others] != nullptr) {
          store_once(args.grad_out[others] + row + column, pack<T>(result));
        }
      }
      take_deferred<T, C>(ring, active, dv, args.deferred, sources, own_sums, first_column != 0);
      for (int j = args.deferred; j < others; ++j) {
        uint4 x;
        uint4 grad;
        float dots[C];
        ring.receive(active, active && args.grad_in[j] != nullptr, x, grad);
        grad = chain<T, C>(x, grad, dv, own_weights + j * kWaysPadded<C>, dots);
        if (active && args.grad_out[j] != nullptr) {
          store_once(args.grad_out[j] + row + column, grad);
        }
        keep_dots<C, 1>(dots, own_sums, sources, j, sources, first_column != 0);
      }
    }
    if (pre && !one_chunk) {
      consumer_sums<1>(newest_along, scratch[buffer.index][2], consumers);
      for (int column = threadIdx.x * V; column < args.dim; column += chunk) {
        float grad[V];
        get_floats<T>(held, column, args.dim, grad);
        const T* x = args.x[others] + token * args.x_stride[others] + column;
        subtract_along<T>(load_once(x), newest_along[0] * newest_slope(), grad);
        if (args.grad_out[others] != nullptr) {
          store_once(args.grad_out[others] + row + column, pack<T>(grad));
        }
      }
    }
    barrier_arrive(&tokens.sums[buffer.index]);  // the statistics are not read any more either
    buffer.advance(2);
  }
  sync_consumers(consumers);
  float* to = args.partial + static_cast<int64_t>(blockIdx.x) * norm_floats;
  for (int slot = 0; slot < args.slots; ++slot) {
    for (int i = threadIdx.x; i < args.dim; i += consumers) {
      to[slot * args.dim + i] = partial[slot * args.dim + partial_place<T>(i, args.dim)];
    }
  }
#endif
}

template <typename T, int C, bool kNewest>
cudaError_t backward_norm_ways(const AggregateNormBackward& p, int blocks, cudaStream_t stream) {
  const NormSlots slots(p);
  const NormLayout layout(p);
  BackwardNormArgs<T, C> args;
  set_backward_args<T, C>(args, p, 0, p.sources);
  if (kNewest) args.deferred = std::min(args.deferred, args.sources - 1);
  args.post = p.post_weight != nullptr;
  for (int c = 0; c < C; ++c) {
    const bool post = args.post && c == C - 1;
    args.norm_weight[c] = post ? p.post_weight : p.norm_weight[c];
    args.norm_bias[c] = p.norm_bias[c];
    args.saved[c] = static_cast<const T*>(post                          ? p.mix
                                          : p.norm_weight[c] != nullptr ? p.y[c]
                                                                        : nullptr);
    args.dv[c] = args.saved[c] != nullptr && p.dv != nullptr ? static_cast<T*>(p.dv[c]) : nullptr;
    args.weight_slot[c] = slots.weight[c];
    args.bias_slot[c] = slots.bias[c];
  }
  args.slots = slots.count;
  args.shared_norms = layout.shared_norms;
  args.statistics = p.statistics;
  args.partial = p.workspace;
  args.pre_weight = p.pre_weight;
  args.pre_slot = slots.pre;
  args.add_newest = p.add_newest;
  args.tokens = p.tokens;
  args.layer = p.norm == Norm::Layer;
  args.wide = p.wide;
  args.stages = layout.stages;
  const auto launch = [&](auto* kernel) {
    return launch_ring(kernel, args, blocks, layout.columns.threads + 32, layout.stage_bytes,
                       layout.other_bytes, stream);
  };
  if constexpr (kNewest) {
    const cudaError_t error = launch(backward_norm_ring<T, C, kNewest, Remake::Some>);
    return error != cudaSuccess ? error : launch(backward_norm_ring<T, C, kNewest, Remake::None>);
  } else {
    return launch(backward_norm_ring<T, C, kNewest, Remake::Any>);
  }
}

template <typename T, bool kNewest>
cudaError_t backward_norm_of(const AggregateNormBackward& p, int blocks, cudaStream_t stream) {
  switch (p.ways) {
    case 1:
      return backward_norm_ways<T, 1, kNewest>(p, blocks, stream);
    case 2:
      return backward_norm_ways<T, 2, kNewest>(p, blocks, stream);
    case 3:
      return backward_norm_ways<T, 3, kNewest>(p, blocks, stream);
    default:
      return backward_norm_ways<T, 4, kNewest>(p, blocks, stream);
  }
}

template <typename T>
cudaError_t backward_norm(const AggregateNormBackward& p, int blocks, cudaStream_t stream) {
  return newest_first(p) ? backward_norm_of<T, true>(p, blocks, stream)
                         : backward_norm_of<T, false>(p, blocks, stream);
}

}  // namespace muddformer::kernels
