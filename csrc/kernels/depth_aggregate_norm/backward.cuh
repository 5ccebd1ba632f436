// Depth aggregation with normed streams, chained backward, in one pass over the history:
//
//   n        = (Y_c - bias) / weight                  of a normed way (depth_aggregate_norm.h)
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
// Work is split as in depth_aggregate/backward.cuh, but a chunk has up to 512 vectors (NormLayout),
// and the blocks stay and walk over the tokens: each keeps the sums over its tokens for dweight and
// dbias in shared memory, every thread those of its own columns. They are added over the blocks, in
// fixed order, by sum_partials (depth_aggregate_norm.cu).
//
// A stage of the ring holds X_j and G_j, or two deferred sources. dY_c and Y_c of all ways have a
// place of their own, where dV_c takes the place of dY_c: the loops over the ways are not unrolled,
// which keeps the registers of a thread few.
#pragma once

#include "block.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

// kNewest: the last source has more to its gradient. kPlain: RMSNorm without biases.
template <typename T, int C, bool kNewest, bool kOneChunk, bool kPlain>
class NormBackward : NormBlock<T, C, kNewest, kOneChunk> {
  using Base = NormBlock<T, C, kNewest, kOneChunk>;

 public:
  __device__ __forceinline__ NormBackward(const BackwardNormArgs<T, C>& arguments,
                                          NormShared<C>& block_shared, unsigned char* memory)
      : Base(arguments, block_shared, memory), scale(1.0f / static_cast<float>(args.dim)) {
#pragma unroll
    for (int c = 0; c < C; ++c) {
      form |= (args.dy[c] != nullptr ? 1u : 0u) << c;
      form |= (args.saved[c] != nullptr ? 1u : 0u) << (4 + c);
      form |= (args.norm_bias[c] != nullptr ? 1u : 0u) << (8 + c);
      places |= (args.weight_slot[c] & 15u) << (4 * c);
      places |= (args.bias_slot[c] & 15u) << (16 + 4 * c);
    }
  }

  __device__ __forceinline__ void run() {
    this->start();
    const int warp = threadIdx.x / 32;
    if (warp < consumers / 32) {
      consume();
    } else if (warp > consumers / 32) {
      this->help();
    } else if (threadIdx.x % 32 == 0) {
      this->produce();
    }
  }

 private:
  using Base::args, Base::chunk, Base::consumers, Base::held, Base::norms, Base::others, Base::own,
      Base::partial, Base::pre, Base::ring, Base::row_bytes, Base::V;

  // Of way c: whether there is dY, whether it is normed, whether it has a bias; and the places of
  // its weight and bias among the slots. Bits, since loads of indexed parameters are slow.
  __device__ __forceinline__ bool given(int c) const { return (form >> c & 1) != 0; }
  __device__ __forceinline__ bool normed(int c) const { return (form >> (4 + c) & 1) != 0; }
  __device__ __forceinline__ bool biased(int c) const {
    return !kPlain && (form >> (8 + c) & 1) != 0;
  }
  __device__ __forceinline__ bool layer() const { return !kPlain && args.layer; }
  __device__ __forceinline__ bool is_post(int c) const {
    return kNewest && args.post && c == C - 1;
  }
  __device__ __forceinline__ int weight_slot(int c) const { return places >> (4 * c) & 15; }
  __device__ __forceinline__ int bias_slot(int c) const { return places >> (16 + 4 * c) & 15; }

  // This thread's vector of dY_c (0), later dV_c, or of Y_c (1).
  __device__ __forceinline__ uint4* way(int c, int which) const {
    return reinterpret_cast<uint4*>(this->ways + (2 * c + which) * row_bytes) + threadIdx.x;
  }
  __device__ __forceinline__ void receive_ways() {
    barrier_wait(&own.ways_full, ways_phase);
    ways_phase ^= 1;
  }
  // m and r of the ways, then of the last source.
  __device__ __forceinline__ const float* means(int buffer) const { return own.statistics[buffer]; }
  __device__ __forceinline__ const float* factors(int buffer) const {
    return own.statistics[buffer] + (pre ? C + 1 : C);
  }
  __device__ __forceinline__ const float* token_weights(int buffer) const {
    return this->weights + buffer * this->weights_size();
  }
  // A vector of a norm's weight or bias. from is a reference: the parameter is read where it is
  // used.
  __device__ __forceinline__ void norm_values(int slot, const void* const& from, int column,
                                              float (&to)[V]) const {
    if (args.shared_norms) {
      get_floats<T>(norms + slot * args.dim, column, args.dim, to);
    } else {
      load_norm<T>(from, args.wide, column, to);
    }
  }

  // This warp's shares of <g, n> and sum(g) of a token.
  __device__ __forceinline__ void share_along(int buffer) {
    float along[C] = {};
    float total[C] = {};
    for (int first_column = 0; first_column < args.dim;
         first_column = this->next_chunk(first_column)) {
      const int column = first_column + threadIdx.x * V;
      receive_ways();
#pragma unroll 1
      for (int c = 0; c < C; ++c) {
        const uint4 dy_bits = *way(c, 0);
        const uint4 y_bits = *way(c, 1);
        if (column >= args.dim || !given(c) || !normed(c)) continue;
        float dy[V];
        float y[V];
        float value[V];
        float sum = 0.0f;
        unpack<T>(dy_bits, dy);
        unpack<T>(y_bits, y);
        if (is_post(c) || layer()) {
          norm_values(weight_slot(c), args.norm_weight[c], column, value);
          const float factor = is_post(c) ? factors(buffer)[c] : 1.0f;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            value[i] *= dy[i];
            sum += value[i];
            if (is_post(c)) dy[i] = value[i] * factor;
          }
          add_to<C>(total, c, sum);
          sum = 0.0f;
        }
        if (biased(c)) {
          norm_values(bias_slot(c), args.norm_bias[c], column, value);
#pragma unroll
          for (int i = 0; i < V; ++i) y[i] -= value[i];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) sum = fmaf(dy[i], y[i], sum);
        add_to<C>(along, c, sum);
      }
      if (!kOneChunk) release(&own.ways_empty);
    }
    put_shares<C>(along, own.shares[buffer][0]);
    if (layer()) put_shares<C>(total, own.shares[buffer][1]);
  }

  // Puts n, rounded as Y is, in place of Y where the norm's weight is too small to divide by.
  __device__ __forceinline__ void remake(unsigned remade, int buffer, int64_t token, int column) {
#pragma unroll 1
    for (int i = 0; i < 4 * C; ++i) {
      const int c = i / 4;
      if ((remade >> c & 1) == 0) continue;
      float n[kWord<T>];
      remake_normed<T, C, kNewest>(args, token_weights(buffer), c, token, column + i % 4 * kWord<T>,
                                   means(buffer)[c], factors(buffer)[c],
                                   pre ? factors(buffer)[C] : 1.0f, n);
      reinterpret_cast<uint32_t*>(way(c, 1))[i % 4] = pack_word<T>(n);
    }
  }

  // dV_c in place of dY_c, and what this token adds to dweight and dbias.
  __device__ __forceinline__ void make_dv(int buffer, int64_t token, int column) {
    float along[C];
    float total[C] = {};
    get_sums<C>(own.shares[buffer][0], consumers / 32, along);
    if (layer()) get_sums<C>(own.shares[buffer][1], consumers / 32, total);
    const unsigned remade = this->to_remake[column / V];
    if (remade != 0) remake(remade, buffer, token, column);
#pragma unroll 1
    for (int c = 0; c < C; ++c) {
      uint4* at = way(c, 0);
      const uint4 dy_bits = given(c) ? *at : uint4{};
      const uint4 y_bits = *way(c, 1);
      if (!normed(c)) {
        if (!given(c)) *at = dy_bits;
        continue;
      }
      float dy[V];
      float n[V];
      float weight[V];
      float sum[V];
      float* weight_sums = partial + weight_slot(c) * args.dim;
      norm_values(weight_slot(c), args.norm_weight[c], column, weight);
      get_floats<T>(weight_sums, column, args.dim, sum);
      const float r = factors(buffer)[c];
      unpack<T>(dy_bits, dy);
      unpack<T>(y_bits, n);
      if (biased(c)) {
        add_partial<T>(partial + bias_slot(c) * args.dim, column, args.dim, dy);
      }
      if ((remade >> c & 1) == 0) {
        if (biased(c)) {
          float bias[V];
          norm_values(bias_slot(c), args.norm_bias[c], column, bias);
#pragma unroll
          for (int i = 0; i < V; ++i) n[i] -= bias[i];
        }
#pragma unroll
        for (int i = 0; i < V; ++i) n[i] *= is_post(c) ? r : reciprocal(weight[i]);
      }
      const float shift = layer() && !is_post(c) ? entry_of<C>(total, c) * scale : 0.0f;
      const float slope = entry_of<C>(along, c) * scale;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        sum[i] = fmaf(dy[i], n[i], sum[i]);
        dy[i] = r * fmaf(-slope, n[i], fmaf(dy[i], weight[i], -shift));
      }
      put_floats<T>(weight_sums, column, args.dim, sum);
      if (is_post(c)) *way(c, 1) = dy_bits;
      const uint4 bits = pack<T>(dy);
      *at = bits;
      if (args.dv[c] != nullptr) store_once(args.dv[c] + token * args.dim + column, bits);
    }
  }

  __device__ __forceinline__ void consume() {
    RingPlace buffer;  // of the weights and statistics
    for (int64_t token = blockIdx.x; token < args.tokens; token += gridDim.x) {
      const int64_t row = token * args.dim;
      const float* w = token_weights(buffer.index);
      float* warp_dots =
          this->sums + buffer.index * this->sums_size() + threadIdx.x / 32 * C * args.sources;
      barrier_wait(&own.weights_full[buffer.index], buffer.phase);
      share_along(buffer.index);
      sync_consumers(consumers);

      const float newest_r = pre ? factors(buffer.index)[C] : 1.0f;
      const float newest_scale = newest_r * newest_r * scale;
      float newest_along[1] = {0.0f};  // <g, n> of the last source
      for (int first_column = 0; first_column < args.dim;
           first_column = this->next_chunk(first_column)) {
        const int column = first_column + threadIdx.x * V;
        const bool active = column < args.dim;
        if (!kOneChunk) receive_ways();
        if (active) make_dv(buffer.index, token, column);
        uint4 dv[C];
#pragma unroll
        for (int c = 0; c < C; ++c) dv[c] = active ? *way(c, 0) : uint4{};
        const uint4 post_dy = active && is_post(C - 1) ? *way(C - 1, 1) : uint4{};
        release(&own.ways_empty);

        uint4 x;
        uint4 grad;
        float dots[C];
        const auto receive = [&](int j) {
          ring.receive(active, active && args.grad_in[j] != nullptr, x, grad);
        };
        const auto store = [&](int j, const uint4& result) {
          if (active && args.grad_out[j] != nullptr) {
            store_once(args.grad_out[j] + row + column, result);
          }
        };
        const auto keep = [&](int j) {
          keep_dots<C, 1>(dots, warp_dots, args.sources, j, args.sources, first_column != 0);
        };
        if constexpr (kNewest) {
          float weight[V];
          float result[V];
          receive(others);
#pragma unroll
          for (int i = 0; i < V; ++i) weight[i] = 1.0f;
          if (pre && active) norm_values(args.pre_slot, args.pre_weight, column, weight);
          chain_newest<T, C>(x, grad, dv, post_dy, w + others * kWaysPadded<C>, newest_r,
                             args.add_newest, args.post, weight, dots, newest_along[0], result);
          keep(others);
          if (pre && active) {
            add_partial<T>(partial + args.pre_slot * args.dim, column, args.dim, weight);
          }
          if (pre && kOneChunk) {
            consumer_sums<1>(newest_along, own.shares[buffer.index][2], consumers);
            subtract_along<T>(x, newest_along[0] * newest_scale, result);
          }
          if (!pre || kOneChunk) {
            store(others, pack<T>(result));
          } else if (active) {
            put_floats<T>(held, column, args.dim, result);
          }
        }
        take_deferred<T, C>(ring, active, dv, args.deferred, args.sources, warp_dots,
                            first_column != 0);
        for (int j = args.deferred; j < others; ++j) {
          receive(j);
          store(j, chain<T, C>(x, grad, dv, w + j * kWaysPadded<C>, dots));
          keep(j);
        }
      }
      if (pre && !kOneChunk) {
        consumer_sums<1>(newest_along, own.shares[buffer.index][2], consumers);
        for (int column = threadIdx.x * V; column < args.dim; column += chunk) {
          float result[V];
          get_floats<T>(held, column, args.dim, result);
          subtract_along<T>(load_once(this->source(token, others, column)),
                            newest_along[0] * newest_scale, result);
          if (args.grad_out[others] != nullptr) {
            store_once(args.grad_out[others] + row + column, pack<T>(result));
          }
        }
      }
      barrier_arrive(&own.sums_full[buffer.index]);  // the statistics are not read any more either
      buffer.advance(2);
    }
    sync_consumers(consumers);
    float* to = args.partial + static_cast<int64_t>(blockIdx.x) * args.slots * args.dim;
    for (int slot = 0; slot < args.slots; ++slot) {
      for (int i = threadIdx.x; i < args.dim; i += consumers) {
        to[slot * args.dim + i] = partial[slot * args.dim + partial_place<T>(i, args.dim)];
      }
    }
  }

  const float scale;
  uint32_t ways_phase = 0;
  unsigned form = 0;
  unsigned places = 0;
};

#endif  // __CUDA_ARCH__ >= 900

template <typename T, int C, bool kNewest, bool kOneChunk, bool kPlain, int kThreads>
__global__ void __launch_bounds__(kThreads, 1)
    backward_norm_ring(const __grid_constant__ BackwardNormArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  static_assert(sizeof(NormShared<C>) <= kStaticBytes);
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ NormShared<C> shared;
  NormBackward<T, C, kNewest, kOneChunk, kPlain>(args, shared, memory).run();
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
  const auto launch = [&](auto* few, auto* many) {
    return launch_ring(layout.roomy ? few : many, args, blocks, layout.columns.threads + 32,
                       layout.stage_bytes, layout.other_bytes, stream);
  };
  constexpr int kMany = NormThreads::kBackward, kFew = NormThreads::kBackwardRoomy;
  if (layout.columns.chunks > 1) {
    return launch(backward_norm_ring<T, C, kNewest, false, false, kFew>,
                  backward_norm_ring<T, C, kNewest, false, false, kMany>);
  }
  const bool plain = !args.layer && std::none_of(args.norm_bias, args.norm_bias + C,
                                                 [](const void* bias) { return bias != nullptr; });
  return plain ? launch(backward_norm_ring<T, C, kNewest, true, true, kFew>,
                        backward_norm_ring<T, C, kNewest, true, true, kMany>)
               : launch(backward_norm_ring<T, C, kNewest, true, false, kFew>,
                        backward_norm_ring<T, C, kNewest, true, false, kMany>);
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
