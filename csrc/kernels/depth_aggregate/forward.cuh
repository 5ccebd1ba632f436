// Depth aggregation, forward, up to four ways in one read of each source:
//
//   Y_c[t, :] = sum_j w[t, c, j] X_j[t, :]
//
// X_j [N, D] with a row stride each, w [N, C, S], Y_c [N, D]; float32 sums, each output rounded and
// written once.
//
// A block has one token and a chunk of at most 256 vectors of 16 bytes of its row (see
// common/launch.h). A thread owns one vector and keeps the C * kVector sums of it in registers, so
// that no thread needs another's result. Blocks that end and start while others are in their middle
// keep the memory busier than blocks that stay and walk over the tokens.
//
// Path::Ring: one thread requests row after row by bulk copies, the others multiply what has come.
// Path::Vector: every thread has four loads in flight.
#pragma once

#include <algorithm>

#include "../common/launch.h"
#include "../common/ring.cuh"
#include "../common/vector.cuh"
#include "launch.h"

namespace muddformer::kernels {

// Kernel parameters. Pointers travel by value: there is no table to copy to the device.
template <typename T, int C>
struct ForwardArgs {
  const T* x[kForwardTable];
  int64_t x_stride[kForwardTable];
  T* y[C];
  const T* w;
  int64_t w_stride;
  int64_t way_stride;  // of w
  int dim;
  int sources;
  int chunks;
  int stages;
};

template <typename T, int C>
__device__ __forceinline__ void add_source(const uint4& bits, const float* weights,
                                           float (&sums)[C][kVector<T>]) {
  float x[kVector<T>];
  float w[C];
  unpack<T>(bits, x);
  read_ways<C>(weights, w);
#pragma unroll
  for (int c = 0; c < C; ++c) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sums[c][i] = fmaf(w[c], x[i], sums[c][i]);
  }
}

template <typename T, int C>
__device__ __forceinline__ void store_sums(const ForwardArgs<T, C>& args, int64_t token, int column,
                                           const float (&sums)[C][kVector<T>]) {
#pragma unroll
  for (int c = 0; c < C; ++c) store_once(args.y[c] + token * args.dim + column, pack<T>(sums[c]));
}

template <typename T, int C>
__global__ void __launch_bounds__(kRingThreads, kRingBlocks)
    forward_ring(const __grid_constant__ ForwardArgs<T, C> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ RingBarriers ring;
  const int consumers = blockDim.x - 32;
  const int stage_bytes = consumers * 16;
  float* weights = reinterpret_cast<float*>(shared + args.stages * stage_bytes);
  const int64_t token = blockIdx.x / args.chunks;
  const int first_column = (blockIdx.x % args.chunks) * consumers * kVector<T>;

  const bool producer = static_cast<int>(threadIdx.x) == consumers;
  if (producer) ring_init(ring, args.stages, consumers);
  __syncthreads();

  RingPlace stage;
  if (static_cast<int>(threadIdx.x) >= consumers) {
    const int width = min(consumers * kVector<T>, args.dim - first_column);
    const uint32_t bytes = width * sizeof(T);
    for (int j = 0; producer && j < args.sources; ++j) {
      barrier_wait(&ring.empty[stage.index], stage.phase ^ 1);  // at once in the first round
      barrier_expect(&ring.full[stage.index], bytes);
      bulk_copy(shared + stage.index * stage_bytes,
                args.x[j] + token * args.x_stride[j] + first_column, bytes,
                &ring.full[stage.index]);
      stage.advance(args.stages);
    }
    return;
  }
  load_weights<C>(weights, args.w + token * args.w_stride, args.way_stride, args.sources,
                  consumers);
  sync_consumers(consumers);

  float sums[C][kVector<T>] = {};
  for (int j = 0; j < args.sources; ++j) {
    barrier_wait(&ring.full[stage.index], stage.phase);
    const uint4 bits =
        *reinterpret_cast<const uint4*>(shared + stage.index * stage_bytes + threadIdx.x * 16);
    release(&ring.empty[stage.index]);
    stage.advance(args.stages);
    add_source<T, C>(bits, weights + j * kWaysPadded<C>, sums);
  }
  const int column = first_column + threadIdx.x * kVector<T>;
  if (column < args.dim) store_sums(args, token, column, sums);
#endif
}

template <typename T, int C>
__global__ void __launch_bounds__(kMaxConsumers, 4)
    forward_vector(const __grid_constant__ ForwardArgs<T, C> args) {
  constexpr int kAhead = 4;
  __shared__ __align__(16) float weights[kForwardTable * kWaysPadded<C>];
  const int64_t token = blockIdx.x / args.chunks;
  const int column = ((blockIdx.x % args.chunks) * blockDim.x + threadIdx.x) * kVector<T>;
  const int sources = args.sources;
  load_weights<C>(weights, args.w + token * args.w_stride, args.way_stride, sources, blockDim.x);
  __syncthreads();
  if (column >= args.dim) return;

  const auto load = [&](int j) { return load_once(args.x[j] + token * args.x_stride[j] + column); };
  float sums[C][kVector<T>] = {};
  int j = 0;
  for (; j + kAhead <= sources; j += kAhead) {
    uint4 ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) ahead[i] = load(j + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      add_source<T, C>(ahead[i], weights + (j + i) * kWaysPadded<C>, sums);
    }
  }
#pragma unroll 1
  for (; j < sources; ++j) add_source<T, C>(load(j), weights + j * kWaysPadded<C>, sums);
  store_sums(args, token, column, sums);
}

// What every forward kernel reads: C ways of p from first_way on.
template <typename T, int C>
void set_forward_args(ForwardArgs<T, C>& args, const AggregateForward& p, int first_way,
                      const Columns& columns) {
  for (int j = 0; j < p.sources; ++j) {
    args.x[j] = static_cast<const T*>(p.x[j]);
    args.x_stride[j] = p.x_stride[j];
  }
  for (int c = 0; c < C; ++c) args.y[c] = static_cast<T*>(p.y[first_way + c]);
  args.w = static_cast<const T*>(p.w) + static_cast<int64_t>(first_way) * p.sources;
  args.w_stride = p.w_stride;
  args.way_stride = p.sources;
  args.dim = static_cast<int>(p.dim);
  args.sources = p.sources;
  args.chunks = columns.chunks;
}

template <typename T, int C>
cudaError_t forward_ways(const AggregateForward& p, int first_way, Path path, cudaStream_t stream) {
  const Columns columns = split_columns(static_cast<int>(p.dim) / kVector<T>);
  ForwardArgs<T, C> args;
  set_forward_args<T, C>(args, p, first_way, columns);

  const int64_t blocks = p.tokens * columns.chunks;
  if (path == Path::Vector) {
    forward_vector<T, C><<<static_cast<unsigned>(blocks), columns.threads, 0, stream>>>(args);
    return cudaGetLastError();
  }
  const int stage_bytes = columns.threads * 16;
  args.stages = ring_stages(ring_blocks(columns.threads), stage_bytes, kForwardBytesInFlight);
  return launch_ring(forward_ring<T, C>, args, blocks, columns.threads, stage_bytes,
                     weights_bytes<C>(p.sources), stream);
}

// The launches of one dtype: up to four ways each.
template <typename T>
cudaError_t forward_fast(const AggregateForward& p, Path path, cudaStream_t stream) {
  for (int c = 0; c < p.ways; c += 4) {
    cudaError_t error = cudaSuccess;
    switch (std::min(p.ways - c, 4)) {
      case 1:
        error = forward_ways<T, 1>(p, c, path, stream);
        break;
      case 2:
        error = forward_ways<T, 2>(p, c, path, stream);
        break;
      case 3:
        error = forward_ways<T, 3>(p, c, path, stream);
        break;
      default:
        error = forward_ways<T, 4>(p, c, path, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace muddformer::kernels
