// Depth aggregation, chained backward, in one pass over the history:
//
//   dX_j[t, :] = G_j[t, :] + sum_c w[t, c, j] dY_c[t, :]
//   dw[t, c, j] = <dY_c[t, :], X_j[t, :]>
//
// G_j is the gradient that later layers have accumulated. X_j, G_j, dX_j, dY_c [N, D], w and dw
// [N, C, S]. X, G and dY are read once, dX is written once; float32 sums, rounded once.
//
// A block has one token. Its row is walked in chunks of at most 256 vectors of 16 bytes (see
// common/launch.h), one for each thread: dY of the chunk stays in registers while the sources pass
// by. The dot products are summed over a warp, kept per warp in shared memory, and added over the
// warps, always in the same order, at the end of the token.
//
// The first sources may be `deferred`: their dX is not wanted here (deferred_flush.h), only dw.
//
// Path::Ring: one thread requests rows by bulk copies; a stage holds X_j and G_j, or two of dY, or
// two deferred sources.
// Path::Vector: the loads of two sources are in flight together.
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "../common/ring.cuh"
#include "../common/vector.cuh"
#include "../common/warp_sums.cuh"
#include "launch.h"

namespace muddformer::kernels {

inline constexpr int kBackwardTable = 64;  // sources of one launch

// Kernel parameters. Pointers travel by value: there is no table to copy to the device.
template <typename T, int C>
struct BackwardArgs {
  const T* x[kBackwardTable];
  int64_t x_stride[kBackwardTable];
  const T* grad_in[kBackwardTable];
  T* grad_out[kBackwardTable];
  const T* dy[C];
  const T* w;
  T* dw;
  int64_t w_stride;
  int64_t dw_stride;
  int64_t way_stride;  // of w and dw
  int dim;
  int sources;
  int deferred;
  int stages;
};

// One vector of dX_j, and what this thread adds to the C dot products. Word by word, and dY stays
// packed: registers are what limits the number of warps here.
template <typename T, int C>
__device__ __forceinline__ uint4 chain(const uint4& x_bits, const uint4& grad_bits,
                                       const uint4 (&dy_bits)[C], const float* weights,
                                       float* dots) {
  uint32_t result[4];
  float w[C];
  read_ways<C>(weights, w);
#pragma unroll
  for (int c = 0; c < C; ++c) dots[c] = 0.0f;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float x[kWord<T>];
    float grad[kWord<T>];
    unpack_word<T>(word_of(x_bits, word), x);
    unpack_word<T>(word_of(grad_bits, word), grad);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float dy[kWord<T>];
      unpack_word<T>(word_of(dy_bits[c], word), dy);
#pragma unroll
      for (int i = 0; i < kWord<T>; ++i) {
        dots[c] = fmaf(dy[i], x[i], dots[c]);
        grad[i] = fmaf(w[c], dy[i], grad[i]);
      }
    }
    result[word] = pack_word<T>(grad);
  }
  return make_uint4(result[0], result[1], result[2], result[3]);
}

// Adds up the dot products of some sources, j and later ones before `end`, over the warp. sums:
// [C][S] of this warp; later chunks of a row add to it.
template <int C, int kSources>
__device__ __forceinline__ void keep_dots(float (&dots)[kSources * C], float* sums, int sources,
                                          int j, int end, bool add) {
  constexpr int kDots = kSources * C;
  const int lane = threadIdx.x % 32;
  const int first = warp_sums<kDots>(dots, lane);
  if (lane % kSharers<kDots> != 0) return;
#pragma unroll
  for (int i = 0; i < kDots >> kHalvings<kDots>; ++i) {
    const int source = kSources == 1 ? j : j + (first + i) / C;
    const int way = kSources == 1 ? first + i : (first + i) % C;
    if (kSources > 1 && source >= end) continue;
    float& sum = sums[way * sources + source];
    sum = add ? sum + dots[i] : dots[i];
  }
}

// What this thread adds to the C dot products of a source whose gradient is deferred.
template <typename T, int C>
__device__ __forceinline__ void dot_ways(const uint4& x_bits, const uint4 (&dy_bits)[C],
                                         float* dots) {
#pragma unroll
  for (int c = 0; c < C; ++c) dots[c] = 0.0f;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    float x[kWord<T>];
    unpack_word<T>(word_of(x_bits, word), x);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float dy[kWord<T>];
      unpack_word<T>(word_of(dy_bits[c], word), dy);
#pragma unroll
      for (int i = 0; i < kWord<T>; ++i) dots[c] = fmaf(dy[i], x[i], dots[c]);
    }
  }
}

#if __CUDA_ARCH__ >= 900

// The ring as one thread sees it. A stage holds two rows, either of which may be missing.
struct PairRing {
  RingBarriers& barriers;
  unsigned char* shared;
  int row_bytes;
  int stages;
  RingPlace place{};

  // Asks for two rows to come into the next stage.
  __device__ __forceinline__ void request(const void* first, const void* second, uint32_t bytes) {
    barrier_wait(&barriers.empty[place.index], place.phase ^ 1);  // at once in the first round
    uint64_t* full = &barriers.full[place.index];
    unsigned char* to = shared + place.index * 2 * row_bytes;
    barrier_expect(full, (first != nullptr ? bytes : 0) + (second != nullptr ? bytes : 0));
    if (first != nullptr) bulk_copy(to, first, bytes, full);
    if (second != nullptr) bulk_copy(to + row_bytes, second, bytes, full);
    place.advance(stages);
  }

  // Takes this thread's vector of the two rows of the next stage, zeros for a row that is missing.
  __device__ __forceinline__ void receive(bool has_first, bool has_second, uint4& first,
                                          uint4& second) {
    const unsigned char* from = shared + place.index * 2 * row_bytes + threadIdx.x * 16;
    barrier_wait(&barriers.full[place.index], place.phase);
    first = has_first ? *reinterpret_cast<const uint4*>(from) : uint4{};
    second = has_second ? *reinterpret_cast<const uint4*>(from + row_bytes) : uint4{};
    release(&barriers.empty[place.index]);
    place.advance(stages);
  }
};

// Takes the deferred sources of a chunk of columns out of the ring: their dot products alone, for
// which the two sources of a stage are added up over the warp together (one by one, the wait for
// the shuffles was longer than that for the memory).
template <typename T, int C>
__device__ __forceinline__ void take_deferred(PairRing& ring, bool active,
                                              const uint4 (&dy_bits)[C], int deferred, int sources,
                                              float* sums, bool add) {
  for (int j = 0; j < deferred; j += 2) {
    uint4 x[2];
    ring.receive(active, active && j + 1 < deferred, x[0], x[1]);
    float dots[2 * C];
    dot_ways<T, C>(x[0], dy_bits, dots);
    dot_ways<T, C>(x[1], dy_bits, dots + C);
    keep_dots<C, 2>(dots, sums, sources, j, deferred, add);
  }
}

#endif

// dw of a token from the sums of the warps, by some threads.
template <typename T, int C>
__device__ __forceinline__ void store_dw(const BackwardArgs<T, C>& args, int64_t token,
                                         const float* sums, int warps, int thread, int threads) {
  const int values = C * args.sources;
  T* dw = args.dw + token * args.dw_stride;
#pragma unroll 1
  for (int i = thread; i < values; i += threads) {
    float sum = 0.0f;
#pragma unroll 2
    for (int warp = 0; warp < warps; ++warp) sum += sums[warp * values + i];
    const int c = i / args.sources;
    dw[c * args.way_stride + (i - c * args.sources)] = narrow<T>(sum);
  }
}

template <typename T, int C>
__global__ void __launch_bounds__(kRingThreads, kRingBlocks)
    backward_ring(const __grid_constant__ BackwardArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RingBarriers barriers;
  const int consumers = blockDim.x - 32;
  const int row_bytes = consumers * 16;
  const int stage_bytes = 2 * row_bytes;
  const int chunk = consumers * kVector<T>;
  const int sources = args.sources;
  const int64_t token = blockIdx.x;
  const int64_t row = token * args.dim;
  float* weights = reinterpret_cast<float*>(shared + args.stages * stage_bytes);
  float* sums = weights + sources * kWaysPadded<C>;
  PairRing ring{barriers, shared, row_bytes, args.stages};

  const bool producer = static_cast<int>(threadIdx.x) == consumers;
  if (producer) ring_init(barriers, args.stages, consumers);
  __syncthreads();

  if (static_cast<int>(threadIdx.x) >= consumers) {
    for (int column = 0; producer && column < args.dim; column += chunk) {
      const uint32_t bytes = min(chunk, args.dim - column) * sizeof(T);
      const auto part = [&](const T* rows) {
        return rows != nullptr ? rows + row + column : nullptr;
      };
#pragma unroll
      for (int c = 0; c < C; c += 2) {
        ring.request(part(args.dy[c]), c + 1 < C ? part(args.dy[(c + 1) % C]) : nullptr, bytes);
      }
      const auto source = [&](int j) { return args.x[j] + token * args.x_stride[j] + column; };
      for (int j = 0; j < args.deferred; j += 2) {
        ring.request(source(j), j + 1 < args.deferred ? source(j + 1) : nullptr, bytes);
      }
      for (int j = args.deferred; j < sources; ++j) {
        ring.request(source(j), part(args.grad_in[j]), bytes);
      }
    }
    return;
  }

  load_weights<C>(weights, args.w + token * args.w_stride, args.way_stride, sources, consumers);
  sync_consumers(consumers);
  float* own_sums = sums + threadIdx.x / 32 * C * sources;
  for (int first_column = 0; first_column < args.dim; first_column += chunk) {
    const int column = first_column + threadIdx.x * kVector<T>;
    const bool active = column < args.dim;
    uint4 dy[C];
#pragma unroll
    for (int c = 0; c < C; c += 2) {
      uint4 second;
      ring.receive(active && args.dy[c] != nullptr,
                   active && c + 1 < C && args.dy[(c + 1) % C] != nullptr, dy[c], second);
      if (c + 1 < C) dy[(c + 1) % C] = second;
    }
    take_deferred<T, C>(ring, active, dy, args.deferred, sources, own_sums, first_column != 0);
    for (int j = args.deferred; j < sources; ++j) {
      uint4 x;
      uint4 grad;
      float dots[C];
      ring.receive(active, active && args.grad_in[j] != nullptr, x, grad);
      grad = chain<T, C>(x, grad, dy, weights + j * kWaysPadded<C>, dots);
      if (active && args.grad_out[j] != nullptr) store_once(args.grad_out[j] + row + column, grad);
      keep_dots<C, 1>(dots, own_sums, sources, j, sources, first_column != 0);
    }
  }
  sync_consumers(consumers);
  store_dw(args, token, sums, consumers / 32, threadIdx.x, consumers);
#endif
}

template <typename T, int C>
__global__ void __launch_bounds__(kMaxConsumers, 3)
    backward_vector(const __grid_constant__ BackwardArgs<T, C> args) {
  constexpr int kAhead = 2;
  __shared__ __align__(16) float weights[kBackwardTable * kWaysPadded<C>];
  __shared__ float sums[kMaxConsumers / 32 * C * kBackwardTable];
  const int64_t token = blockIdx.x;
  const int64_t row = token * args.dim;
  const int chunk = blockDim.x * kVector<T>;
  const int sources = args.sources;
  float* own_sums = sums + threadIdx.x / 32 * C * sources;
  load_weights<C>(weights, args.w + token * args.w_stride, args.way_stride, sources, blockDim.x);
  __syncthreads();

  for (int first_column = 0; first_column < args.dim; first_column += chunk) {
    const int column = first_column + threadIdx.x * kVector<T>;
    const bool active = column < args.dim;
    const auto load = [&](const T* rows) {
      return active && rows != nullptr ? load_once(rows + row + column) : uint4{};
    };
    const auto load_x = [&](int j) {
      return active ? load_once(args.x[j] + token * args.x_stride[j] + column) : uint4{};
    };
    uint4 dy[C];
#pragma unroll
    for (int c = 0; c < C; ++c) dy[c] = load(args.dy[c]);
    const auto take = [&](int j, const uint4& x, const uint4& grad) {
      float dots[C];
      const uint4 result = chain<T, C>(x, grad, dy, weights + j * kWaysPadded<C>, dots);
      if (active && args.grad_out[j] != nullptr) {
        store_once(args.grad_out[j] + row + column, result);
      }
      keep_dots<C, 1>(dots, own_sums, sources, j, sources, first_column != 0);
    };
    int j = 0;
    for (; j + kAhead <= sources; j += kAhead) {
      uint4 x[kAhead];
      uint4 grad[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        x[i] = load_x(j + i);
        grad[i] = load(args.grad_in[j + i]);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) take(j + i, x[i], grad[i]);
    }
#pragma unroll 1
    for (; j < sources; ++j) take(j, load_x(j), load(args.grad_in[j]));
  }
  __syncthreads();
  store_dw(args, token, sums, blockDim.x / 32, threadIdx.x, blockDim.x);
}

// What every backward kernel reads: sources of p from first_source on, at most kBackwardTable.
template <typename T, int C>
void set_backward_args(BackwardArgs<T, C>& args, const AggregateBackward& p, int first_source,
                       int sources) {
  for (int j = 0; j < sources; ++j) {
    args.x[j] = static_cast<const T*>(p.x[first_source + j]);
    args.x_stride[j] = p.x_stride[first_source + j];
    args.grad_in[j] = static_cast<const T*>(p.grad_in[first_source + j]);
    args.grad_out[j] = static_cast<T*>(p.grad_out[first_source + j]);
  }
  for (int c = 0; c < C; ++c) args.dy[c] = static_cast<const T*>(p.dy[c]);
  args.w = static_cast<const T*>(p.w) + first_source;
  args.dw = static_cast<T*>(p.dw) + first_source;
  args.w_stride = p.w_stride;
  args.dw_stride = static_cast<int64_t>(C) * p.sources;
  args.way_stride = p.sources;
  args.dim = static_cast<int>(p.dim);
  args.sources = sources;
  args.deferred = 0;
  while (args.deferred < sources && args.grad_out[args.deferred] == nullptr) ++args.deferred;
}

template <typename T, int C>
cudaError_t backward_sources(const AggregateBackward& p, int first_source, int sources, Path path,
                             cudaStream_t stream) {
  BackwardArgs<T, C> args;
  set_backward_args<T, C>(args, p, first_source, sources);
  const Columns columns = split_columns(args.dim / kVector<T>);
  if (path == Path::Vector) {
    backward_vector<T, C><<<static_cast<unsigned>(p.tokens), columns.threads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  const int stage_bytes = 2 * columns.threads * 16;
  const int sums_bytes = columns.threads / 32 * C * sources * static_cast<int>(sizeof(float));
  args.stages = ring_stages(ring_blocks(columns.threads), stage_bytes, kBackwardBytesInFlight);
  return launch_ring(backward_ring<T, C>, args, p.tokens, columns.threads, stage_bytes,
                     weights_bytes<C>(sources) + sums_bytes, stream);
}

// The launches of one dtype, for up to four ways.
template <typename T>
cudaError_t backward_fast(const AggregateBackward& p, Path path, cudaStream_t stream) {
  for (int j = 0; j < p.sources; j += kBackwardTable) {
    const int sources = std::min(p.sources - j, kBackwardTable);
    cudaError_t error = cudaSuccess;
    switch (p.ways) {
      case 1:
        error = backward_sources<T, 1>(p, j, sources, path, stream);
        break;
      case 2:
        error = backward_sources<T, 2>(p, j, sources, path, stream);
        break;
      case 3:
        error = backward_sources<T, 3>(p, j, sources, path, stream);
        break;
      default:
        error = backward_sources<T, 4>(p, j, sources, path, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace muddformer::kernels
