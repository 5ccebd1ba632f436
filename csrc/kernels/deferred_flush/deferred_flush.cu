// Deferred gradients of the hidden states, all terms in one pass:
//
//   dX_j[t, :] = G_j[t, :] + sum_k w_k[t, j] dV_k[t, :]
//
// G_j, dX_j, dV_k [N, D]; a factor k is one way of one layer. Each tensor is read or written once
// where there are at most 16 factors and 64 sources.
//
// For one token this is a product of matrices, w^T [S, K] times dV [K, D], and K = 16 factors (four
// layers of four ways) are just what one tensor core instruction sums over; G_j is what its sums
// start from. A warp has one token and 256 of its columns: dV and 16 rows of G at a time lie in its
// own part of shared memory, so that the memory sees rows of 512 bytes; the sums take G's place
// there and leave as whole rows. Warps wait for nobody else. The next 16 rows are under way
// meanwhile in a second buffer. More than 16 factors or 64 sources take several launches.
#include "../common/device.h"
#include "../common/launch.h"
#include "../common/tensor_core.cuh"
#include "../common/vector.cuh"
#include "deferred_flush.h"

namespace muddformer::kernels {
namespace {

constexpr int kFactors = 16;
constexpr int kSources = 64;
constexpr int kTile = 16;      // sources of a product
constexpr int kColumns = 256;  // of a warp
constexpr int kRowBytes = 2 * kColumns;
constexpr int kTileBytes = 16 * kRowBytes;
constexpr int kWeightsRowBytes = 2 * kSources;
constexpr int kWeightsBytes = kFactors * kWeightsRowBytes;
constexpr int kWarps = 2;

// Shared memory of a warp. What counts is how many warps a multiprocessor has room for: on an H100
// eight rows less are 2 more.
__host__ __device__ constexpr int warp_bytes(int rows) {
  return kWeightsBytes + kTileBytes + rows * kRowBytes;
}

template <typename T>
struct FlushArgs {
  const T* dv[kFactors];
  const T* w[kFactors];
  int64_t w_stride[kFactors];
  const T* grad_in[kSources];
  T* grad_out[kSources];
  int64_t items;  // tokens times chunks of columns
  int chunks;
  int dim;
  int sources;
  int factors;
  int rows;  // of G in shared memory: 8, 16, or with a second buffer 24 or 32
};

// The weights of a token as a tile [factor][source], zeros where there are none. All are under way
// at once: one after the other they took as long as everything else.
template <typename T>
__device__ __forceinline__ void bring_weights(const FlushArgs<T>& args, unsigned char* to,
                                              int64_t token) {
  for (int j = threadIdx.x % 32; j < (args.sources + kTile - 1) / kTile * kTile; j += 32) {
    T w[kFactors];
#pragma unroll
    for (int k = 0; k < kFactors; ++k) {
      const bool there = k < args.factors && j < args.sources;
      w[k] = there ? args.w[k][token * args.w_stride[k] + j] : narrow<T>(0.0f);
    }
#pragma unroll
    for (int k = 0; k < kFactors; ++k) {
      *reinterpret_cast<T*>(to + swizzled(k, j / 8, kWeightsRowBytes) + j % 8 * sizeof(T)) = w[k];
    }
  }
}

// Adds the products to a tile of G, in place; half a tile has 8 rows. A lane changes the words that
// it reads. Some chunks are read before any is written: one by one, each would wait for the one
// before, and there are few warps to fill the time.
template <typename T>
__device__ __forceinline__ void add_products(unsigned char* tile, bool half_tile, uint32_t factors,
                                             const uint32_t (&a)[4]) {
  constexpr int kAhead = 8;
  const int lane = threadIdx.x % 32;
  const int row = lane / 4;
#pragma unroll 1
  for (int chunk = 0; chunk < kColumns / 8; chunk += kAhead) {
    uint32_t b[kAhead / 2][4];
    uint32_t* upper[kAhead];
    float sums[kAhead][4] = {};
#pragma unroll
    for (int i = 0; i < kAhead; i += 2) {
      load_right_transposed(b[i / 2], factors, chunk + i, 0, kRowBytes);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      upper[i] =
          reinterpret_cast<uint32_t*>(tile + swizzled(row, chunk + i, kRowBytes) + lane % 4 * 4);
      unpack_word<T>(*upper[i], sums[i]);
      if (!half_tile) unpack_word<T>(upper[i][8 * kRowBytes / 4], sums[i] + 2);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      multiply_add<T>(sums[i], a, b[i / 2][2 * (i % 2)], b[i / 2][2 * (i % 2) + 1]);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      *upper[i] = pack_word<T>(sums[i]);
      if (!half_tile) upper[i][8 * kRowBytes / 4] = pack_word<T>(sums[i] + 2);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    flush_kernel(const __grid_constant__ FlushArgs<T> args) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (item >= args.items) return;
  const int64_t token = item / args.chunks;
  const int column = static_cast<int>(item % args.chunks) * kColumns + lane * kVector<T>;
  const int64_t place = token * args.dim + column;
  const bool active = column < args.dim;

  unsigned char* const factors = shared + warp * warp_bytes(args.rows);
  unsigned char* const tiles = factors + kTileBytes;
  unsigned char* const weights = tiles + args.rows * kRowBytes;
  const uint32_t factors_at = shared_address(factors);
  const uint32_t weights_at = shared_address(weights);

  const auto request_tile = [&](int first, int buffer) {
    const uint32_t to = shared_address(tiles + buffer * kTileBytes);
    const int rows = min(kTile, args.sources - first);
    for (int i = 0; i < rows; ++i) {
      const T* from = args.grad_in[first + i];
      const bool there = active && from != nullptr;
      copy_async(to + swizzled(i, lane, kRowBytes), there ? from + place : args.dv[0], there);
    }
    copy_commit();
  };
#pragma unroll 4
  for (int k = 0; k < kFactors; ++k) {
    const bool there = active && k < args.factors;
    copy_async(factors_at + swizzled(k, lane, kRowBytes), there ? args.dv[k] + place : args.dv[0],
               there);
  }
  request_tile(0, 0);
  bring_weights(args, weights, token);

  for (int first = 0, buffer = 0; first < args.sources; first += kTile, buffer ^= 1) {
    if (first + kTile < args.sources) {
      request_tile(first + kTile, buffer ^ 1);
      copy_wait<1>();
    } else {
      copy_wait<0>();
    }
    __syncwarp();
    unsigned char* const tile = tiles + buffer * kTileBytes;
    uint32_t a[4];
    load_left_transposed(a, weights_at, first / 8, 0, kWeightsRowBytes);
    const int rows = min(kTile, args.sources - first);
    add_products<T>(tile, rows <= kTile / 2, factors_at, a);
    __syncwarp();
    for (int i = 0; active && i < rows; ++i) {
      store_once(args.grad_out[first + i] + place,
                 *reinterpret_cast<const uint4*>(tile + swizzled(i, lane, kRowBytes)));
    }
    __syncwarp();  // before this buffer is filled again
  }
}

// Sources and factors from first on, at most kSources and kFactors of them; the gradients start
// from grad_in.
template <typename T>
cudaError_t flush(const DeferredFlush& p, const void* const* grad_in, int first_source,
                  int first_factor, cudaStream_t stream) {
  FlushArgs<T> args{};
  args.sources = std::min(p.sources - first_source, kSources);
  args.factors = std::min(p.factors - first_factor, kFactors);
  for (int k = 0; k < args.factors; ++k) {
    args.dv[k] = static_cast<const T*>(p.dv[first_factor + k]);
    args.w[k] = static_cast<const T*>(p.w[first_factor + k]) + first_source;
    args.w_stride[k] = p.w_stride[first_factor + k];
  }
  for (int j = 0; j < args.sources; ++j) {
    args.grad_in[j] = static_cast<const T*>(grad_in[first_source + j]);
    args.grad_out[j] = static_cast<T*>(p.grad_out[first_source + j]);
  }
  args.dim = static_cast<int>(p.dim);
  args.chunks = (args.dim + kColumns - 1) / kColumns;
  args.items = p.tokens * args.chunks;
  args.rows = std::min((args.sources + 7) / 8 * 8, 2 * kTile);
  const cudaError_t error = allow_shared_bytes(flush_kernel<T>, kWarps * warp_bytes(args.rows));
  if (error != cudaSuccess) return error;
  const auto blocks = static_cast<unsigned>((args.items + kWarps - 1) / kWarps);
  flush_kernel<T><<<blocks, 32 * kWarps, kWarps * warp_bytes(args.rows), stream>>>(args);
  return cudaGetLastError();
}

template <typename T>
cudaError_t flush_all(const DeferredFlush& p, cudaStream_t stream) {
  for (int k = 0; k < p.factors; k += kFactors) {
    const void* const* from = k == 0 ? p.grad_in : p.grad_out;  // a word is read by its writer
    for (int j = 0; j < p.sources; j += kSources) {
      const cudaError_t error = flush<T>(p, from, j, k, stream);
      if (error != cudaSuccess) return error;
    }
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_deferred_flush(const DeferredFlush& p, cudaStream_t stream) {
  if (p.tokens < 0 || p.dim < 1 || p.dim > kMaxDim || p.sources < 1 || p.factors < 1) {
    return cudaErrorInvalidValue;
  }
  const bool narrow_type = p.dtype == DType::BFloat16 || p.dtype == DType::Float16;
  if (!narrow_type || p.dim % 8 != 0 || p.tokens > INT_MAX / ((p.dim + kColumns - 1) / kColumns) ||
      !aligned(p.dv, p.factors) || !aligned(p.grad_in, p.sources) ||
      !aligned(p.grad_out, p.sources)) {
    return cudaErrorNotSupported;
  }
  if (p.tokens == 0) return cudaSuccess;
  return p.dtype == DType::BFloat16 ? flush_all<__nv_bfloat16>(p, stream)
                                    : flush_all<__half>(p, stream);
}

}  // namespace muddformer::kernels
