// A block of the kernel of layer.cuh: what it knows, and how its inputs come into
// shared memory.
#pragma once

#include "../common/exchange.cuh"
#include "../common/vector.cuh"
#include "layout.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

// Out of the way of what is usual.
__device__ __noinline__ float step_tanh(float x) {
  return tanhf(x);
}

// Plain loads, not of the read-only path: the kernel may have started before they were written.
__device__ __forceinline__ uint4 load_vector(const void* address) {
  uint4 bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(address)
               : "memory");
  return bits;
}

// An entry of the prior, the scale or a norm's parameters, as it is in memory.
template <typename T>
__device__ __forceinline__ uint32_t parameter_bits(const void* from, bool wide, int i) {
  if (sizeof(T) == 4 || wide) return static_cast<const uint32_t*>(from)[i];
  return static_cast<const uint16_t*>(from)[i];
}

template <typename T>
__device__ __forceinline__ float parameter_of(uint32_t bits, bool wide) {
  float values[kWord<T>];
  unpack_word<T>(bits, values);
  return wide ? __uint_as_float(bits) : values[0];
}

template <typename T>
__device__ __forceinline__ float parameter(const void* from, bool wide, int i) {
  return parameter_of<T>(parameter_bits<T>(from, wide, i), wide);
}

// Sum of 16 values that lie together, such as those of all warps.
static_assert(kStepWarps == 16);
__device__ __forceinline__ float sum_of_16(const float* values) {
  float4 sum = *reinterpret_cast<const float4*>(values);
#pragma unroll
  for (int i = 4; i < 16; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(values + i);
    sum.x += four.x, sum.y += four.y, sum.z += four.z, sum.w += four.w;
  }
  return (sum.x + sum.y) + (sum.z + sum.w);
}

// A block of the kernel. kOnce: the launch is such that the loops over x, the rows of W1, the
// entries of a token's A, the columns and the chunks are passed once (once() of the host side), and
// so are not there.
template <typename T, int kTokens, bool kOnce>
class StepBlock {
 public:
  __device__ __forceinline__ StepBlock(const StepArgs<T>& args, unsigned char* shared,
                                       StepBarriers& block_barriers)
      : p(args),
        blocks(kOnce ? 16 : 1 << args.blocks_log2),
        chunks(kOnce ? 1 : args.chunks),
        passes(kOnce ? 1 : args.passes),
        rank(static_cast<int>(blockIdx.x) & (blocks - 1)),
        thread(this_thread()),
        lane(thread % 32),
        warp(thread / 32),
        warps(args.threads / 32),
        first_token((static_cast<int>(blockIdx.x) >> (kOnce ? 4 : args.blocks_log2)) * kTokens),
        entries(4 * chunks * args.padded),
        streams(4 * chunks * kTokens),
        vectors(max(0, min(args.vectors, args.dim / kVector<T> - rank * args.vectors))),
        first_row(min(rank * args.rows, args.hidden)),
        rows(min(args.rows, args.hidden - first_row)),
        first_owned(min(rank << args.owned_log2, kTokens * entries)),
        owned(min(1 << args.owned_log2, kTokens * entries - first_owned)),
        memory(shared),
        places(args.places),
        barriers(block_barriers) {}

 protected:
  static constexpr bool kHasTensorCores = sizeof(T) == 2;

  // Kept in a register: to ask for it again takes long.
  static __device__ __forceinline__ int this_thread() {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));
    return thread;
  }
  template <typename V>
  __device__ __forceinline__ V* at(int place) const {
    return reinterpret_cast<V*>(memory + place);
  }
  __device__ __forceinline__ const T* row_of_w1(int r) const {
    return p.w1 + static_cast<int64_t>(first_row + r) * p.dim;
  }
  // The last cluster repeats the last token where it has none of its own.
  __device__ __forceinline__ int64_t token(int t) const {
    return min(first_token + t, p.tokens - 1);
  }
  // Whether entry n of A has a way and a source, and which.
  __device__ __forceinline__ bool place_of(int n, int& way, int& source) const {
    const int chunk = !kOnce && n >= 4 * p.padded ? 1 : 0;
    way = 4 * chunk + n % 4;
    source = n / 4 - chunk * p.padded;
    return way < p.ways && source < p.sources;
  }
  // Of an entry of the A of all tokens.
  __device__ __forceinline__ uint32_t prior_bits(int entry) const {
#pragma unroll
    for (int t = 1; t < kTokens; ++t) {
      if (entry >= entries) entry -= entries;
    }
    int way, source;
    if (!place_of(entry, way, source)) return 0;
    return parameter_bits<T>(p.prior, p.wide, way * p.sources + source);
  }
  __device__ __forceinline__ float capped(float a) const {
    return __builtin_expect(p.cap > 0.0f, 0) ? p.cap * step_tanh(a / p.cap) : a;
  }

  // What can be done before the kernel ahead is over.
  __device__ __forceinline__ void start() {
    if (lane == 0) {
      if (warp == 0) open_barrier(&barriers.sources, kTokens * p.sources * vectors * 16);
      if (warp == 1) open_barrier(&barriers.parts, blocks * owned * 4);
      if (warp == 2) open_barrier(&barriers.a, kTokens * entries * 4);
      if (warp == 3 && p.normed_ways != 0) {
        open_barrier(&barriers.totals[0], blocks * streams * 4);
        open_barrier(&barriers.totals[1], blocks * streams * 4);
      }
      if (warp < 4) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    announce_barriers();
    // Row by row: a warp that asks for several takes a long time to do it.
#pragma unroll 1
    for (int r = warps - 1 - warp; r < rows && lane == 0; r += warps) {
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row_of_w1(r)),
                   "r"(p.dim * int{sizeof(T)})
                   : "memory");
    }
    const int source = warp * p.warp_sources + lane;
    if (lane < p.warp_sources && source < p.sources) {
      source_stride = p.source[source].stride;
      source_row = p.source[source].x + first_token * source_stride + rank * p.vectors * kVector<T>;
    }
    newest_stride = p.source[p.sources - 1].stride;
    newest = p.source[p.sources - 1].x + first_token * newest_stride;
#pragma unroll 1
    for (int i = thread; i < (p.padded - p.sources) * p.stride; i += p.threads) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        at<uint4>(places.sources)[(t * p.padded + p.sources) * p.stride + i] =
            make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll 1
    for (int i = thread; i < kTokens * (p.rows + 1) * kStepWarps; i += p.threads) {
      if (i % kStepWarps >= warps) at<float>(places.sums)[i] = 0.0f;
    }
#pragma unroll 1
    for (int i = thread; p.normed_ways != 0 && i < 2 * streams * 16; i += p.threads) {
      if (i % 16 >= warps) at<float>(places.warp_sums)[i] = 0.0f;
      if (i % 16 >= blocks) at<float>(places.totals)[i] = 0.0f;
    }
    wait_for_barriers();
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }

  // Asks for everything but x and W1.
  __device__ __forceinline__ void stage() {
    if (lane < owned) owned_prior = prior_bits(first_owned + lane);
    if (source_row != nullptr && vectors > 0) {
      const int source = warp * p.warp_sources + lane;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        bulk_copy(at<uint4>(places.sources) + (t * p.padded + source) * p.stride,
                  source_row + (token(t) - first_token) * source_stride, vectors * 16,
                  &barriers.sources);
      }
    }
#pragma unroll 1
    for (int n = thread; n < entries; n += p.threads) {
      int way, source;
      if (!place_of(n, way, source)) continue;
      const T* from = p.w2 + static_cast<int64_t>(way * p.sources + source) * p.hidden + first_row;
#pragma unroll 1
      for (int k = 0; k < rows; k += 4) {
        copy_async<4 * int{sizeof(T)}>(shared_address(at<T>(places.w2) + n * p.rows + k), from + k);
      }
      if (kOnce) break;
    }
    if (p.normed_ways == 0) return;
    const int bytes = kVector<T> * (p.wide ? 4 : int{sizeof(T)});  // for a vector
#pragma unroll 1
    for (int row = warp; row < 2 * p.ways; row += warps) {
      const void* from = row < p.ways ? p.norm_weight[row] : p.norm_bias[row - p.ways];
      if (from == nullptr) continue;
      unsigned char* to = at<unsigned char>(places.norms) + row * p.vectors * bytes;
#pragma unroll 1
      for (int i = lane * 16; i < vectors * bytes; i += 32 * 16) {
        copy_async<16>(shared_address(to + i),
                       static_cast<const unsigned char*>(from) + rank * p.vectors * bytes + i);
      }
    }
  }

  const StepArgs<T>& p;
  const int blocks;          // of the cluster
  const int chunks, passes;  // as in StepArgs
  const int rank, thread, lane, warp, warps, first_token;
  const int entries;             // of a token's A
  const int streams;             // of all tokens
  const int vectors;             // of this block
  const int first_row, rows;     // of W1 in this block
  const int first_owned, owned;  // entries of the A of all tokens that this block adds up
  unsigned char* const memory;
  const StepShared& places;
  StepBarriers& barriers;
  // The columns that this lane copies of a source, for the first token, and x.
  const T* source_row = nullptr;
  int64_t source_stride = 0;
  const T* newest = nullptr;
  int64_t newest_stride = 0;
  uint32_t owned_prior = 0;  // of entry first_owned + lane, as it is in memory
};

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
