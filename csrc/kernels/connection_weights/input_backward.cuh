// Backward of the connection weights, the rows of D: one read of x and grad_x, one write of dx. For
// every GPU; Hopper has a faster form (input_backward_hopper.cu).
//
//   dx = grad_x + e W1 - x coefficient,   partials of e^T x
//
// x, grad_x, dx [N, D], e [N, K], W1 [K, D]; K is padded to 32 * NT columns. A block owns BD
// columns of D, whose part of W1 stays in shared memory, and a range of tokens. A ring of stages
// brings 64 tokens of x, grad_x and e at a time; x is the right operand of e^T x, whose sums stay
// in registers until the end, and e the left operand of both products. The 8 warps stand 2 x 4 over
// tokens and columns of dx, 4 x 2 over rows and columns of e^T x. dx takes grad_x's place in the
// stage and leaves it in whole vectors one step later.
#pragma once

#include "../common/cluster.cuh"
#include "../common/gelu.cuh"
#include "../common/tensor_core.cuh"
#include "launch.h"

namespace muddformer::kernels {

inline constexpr int kInputTokens = 64;

template <int NT, int BD>
struct InputLayout {
  // How the warps stand over tokens and columns of dx, and over rows and columns of e^T x.
  static constexpr int kDxWarps = 2;
  static constexpr int kDxRows = kInputTokens / 16 / kDxWarps;  // tiles of a warp
  static constexpr int kDxColumns = BD / 8 / 4;
  static constexpr int kOuterRows = NT / 2;
  static constexpr int kOuterColumns = BD / 8 / 2;
  static constexpr int kPadded = 32 * NT;
  static constexpr int kHiddenBytes = kPadded * 2;  // of a row of e
  static constexpr int kRowBytes = BD * 2;          // of a row of x, grad_x and W1
  static constexpr int kW1Bytes = kPadded * kRowBytes;
  static constexpr int kX = 0;
  static constexpr int kGrad = kInputTokens * kRowBytes;
  static constexpr int kE = 2 * kInputTokens * kRowBytes;
  static constexpr int kStageBytes = kE + kInputTokens * kHiddenBytes;
  static constexpr int bytes(int stages) { return kW1Bytes + stages * kStageBytes; }
};

template <typename T, int NT, int BD>
__device__ __forceinline__ void load_input_stage(const ConnectionWeightsInputBackward& p,
                                                 uint32_t stage, int64_t token0, int64_t column0) {
  using Layout = InputLayout<NT, BD>;
  constexpr int kRows = kWeightsThreads / (BD / 8);  // at a time
  const int row0 = threadIdx.x / (BD / 8), chunk = threadIdx.x % (BD / 8);
  const int64_t dim = p.shape.dim, column = column0 + chunk * 8;
  const T* x = static_cast<const T*>(p.x);
  const T* grad_x = static_cast<const T*>(p.grad_x);
  const T* e = static_cast<const T*>(p.grad_hidden);
#pragma unroll
  for (int i = 0; i < kInputTokens / kRows; ++i) {
    const int row = row0 + i * kRows;
    const int64_t token = token0 + row;
    const bool valid = column < dim && token < p.shape.tokens;
    const int64_t offset = valid ? token * dim + column : 0;
    const uint32_t place = swizzled(row, chunk, Layout::kRowBytes);
    copy_async(stage + Layout::kX + place, x + offset, valid);
    if (grad_x != nullptr) copy_async(stage + Layout::kGrad + place, grad_x + offset, valid);
  }
  constexpr int kChunks = 4 * NT;  // of a row of e
#pragma unroll
  for (int i = 0; i < kInputTokens * kChunks / kWeightsThreads; ++i) {
    const int index = threadIdx.x + i * kWeightsThreads;
    const int row = index / kChunks, e_chunk = index % kChunks;
    const int64_t token = token0 + row;
    const bool valid = e_chunk * 8 < p.shape.hidden && token < p.shape.tokens;
    copy_async(stage + Layout::kE + swizzled(row, e_chunk, Layout::kHiddenBytes),
               valid ? e + token * p.shape.hidden + e_chunk * 8 : e, valid);
  }
}

// The block's columns of W1.
template <typename T, int NT, int BD>
__device__ __forceinline__ void load_input_w1(const ConnectionWeightsInputBackward& p,
                                              uint32_t tile, int64_t column0) {
  using Layout = InputLayout<NT, BD>;
  constexpr int kChunks = BD / 8;
  const T* w1 = static_cast<const T*>(p.w1);
  for (int index = threadIdx.x; index < 32 * NT * kChunks; index += kWeightsThreads) {
    const int row = index / kChunks, chunk = index % kChunks;
    const int64_t column = column0 + chunk * 8;
    const bool valid = row < p.shape.hidden && column < p.shape.dim;
    copy_async(tile + swizzled(row, chunk, BD * 2), valid ? w1 + row * p.shape.dim + column : w1,
               valid);
  }
}

// dx of a stage, in the place of grad_x.
template <typename T, int NT, int BD>
__device__ __forceinline__ void input_gradient(const ConnectionWeightsInputBackward& p,
                                               unsigned char* stage, uint32_t w1, int64_t token0) {
  using Layout = InputLayout<NT, BD>;
  constexpr int kRows = Layout::kDxRows, kTiles = Layout::kDxColumns;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int wm = warp % Layout::kDxWarps, wn = warp / Layout::kDxWarps;
  float parts[NT / 2][kRows][2];  // of the coefficients, by slab; added up when they are used
#pragma unroll
  for (int i = 0; i < NT / 2 * 2 * kRows; ++i) {
    const int slab = i / 2 / kRows, m = i / 2 % kRows, half = i % 2;
    const int64_t token = token0 + (wm * kRows + m) * 16 + lane / 4 + 8 * half;
    parts[slab][m][half] =
        token < p.shape.tokens ? p.coefficient[slab * p.shape.tokens + token] : 0;
  }
  const uint32_t e = shared_address(stage) + Layout::kE;
  float acc[kRows][kTiles][4] = {};
#pragma unroll 4
  for (int k = 0; k < Layout::kPadded; k += 16) {
    uint32_t a[kRows][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      load_left(a[m], e, (wm * kRows + m) * 16, k / 8, Layout::kHiddenBytes);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_right_transposed(b, w1, wn * kTiles + n, k, Layout::kRowBytes);
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        multiply_add<T>(acc[m][n], a[m], b[0], b[1]);
        multiply_add<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = (wm * kRows + m) * 16 + lane / 4 + 8 * half;
      float coefficient = 0;
#pragma unroll
      for (int slab = 0; slab < NT / 2; ++slab) coefficient += parts[slab][m][half];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t place = swizzled(row, wn * kTiles + n, Layout::kRowBytes) + lane % 4 * 4;
        float x[2], grad[2] = {0, 0};
        unpack_word<T>(*reinterpret_cast<const uint32_t*>(stage + Layout::kX + place), x);
        uint32_t* word = reinterpret_cast<uint32_t*>(stage + Layout::kGrad + place);
        if (p.grad_x != nullptr) unpack_word<T>(*word, grad);
#pragma unroll
        for (int j = 0; j < 2; ++j) grad[j] += acc[m][n][2 * half + j] - x[j] * coefficient;
        *word = pack_word<T>(grad);
      }
    }
  }
}

// Adds e^T x of a stage.
template <typename T, int NT, int BD>
__device__ __forceinline__ void add_outer(
    uint32_t stage,
    float (&acc)[InputLayout<NT, BD>::kOuterRows][InputLayout<NT, BD>::kOuterColumns][4]) {
  using Layout = InputLayout<NT, BD>;
  constexpr int kTiles = Layout::kOuterColumns;
  const int warp = threadIdx.x / 32, wm = warp % 4, wn = warp / 4;
#pragma unroll
  for (int k = 0; k < kInputTokens; k += 16) {
    uint32_t a[NT / 2][4];
#pragma unroll
    for (int m = 0; m < NT / 2; ++m) {
      load_left_transposed(a[m], stage + Layout::kE, wm * NT + 2 * m, k, Layout::kHiddenBytes);
    }
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      uint32_t b[4];
      load_right_transposed(b, stage + Layout::kX, wn * kTiles + n, k, Layout::kRowBytes);
#pragma unroll
      for (int m = 0; m < NT / 2; ++m) {
        multiply_add<T>(acc[m][n], a[m], b[0], b[1]);
        multiply_add<T>(acc[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Stores dx of a stage. Each thread reads the chunks that it will overwrite with the next copies.
template <typename T, int NT, int BD>
__device__ __forceinline__ void store_input_gradient(const ConnectionWeightsInputBackward& p,
                                                     const unsigned char* stage, int64_t token0,
                                                     int64_t column0) {
  using Layout = InputLayout<NT, BD>;
  constexpr int kRows = kWeightsThreads / (BD / 8);
  const int row0 = threadIdx.x / (BD / 8), chunk = threadIdx.x % (BD / 8);
  const int64_t column = column0 + chunk * 8;
#pragma unroll
  for (int i = 0; i < kInputTokens / kRows; ++i) {
    const int row = row0 + i * kRows;
    const int64_t token = token0 + row;
    if (column < p.shape.dim && token < p.shape.tokens) {
      store_once(static_cast<T*>(p.dx) + token * p.shape.dim + column,
                 *reinterpret_cast<const uint4*>(stage + Layout::kGrad +
                                                 swizzled(row, chunk, Layout::kRowBytes)));
    }
  }
}

template <typename T, int NT, int BD>
__global__ void __launch_bounds__(kWeightsThreads)
    weights_input_backward_kernel(const ConnectionWeightsInputBackward p, int stages) {
  using Layout = InputLayout<NT, BD>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const uint32_t w1 = shared_address(shared);
  unsigned char* ring = shared + Layout::kW1Bytes;
  const int slices = static_cast<int>((p.shape.dim + BD - 1) / BD);
  const int64_t split = blockIdx.x / slices;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x % slices) * BD;
  const int64_t tiles = (p.shape.tokens + kInputTokens - 1) / kInputTokens;
  const int64_t first = tiles * split / p.splits;
  const int64_t count = tiles * (split + 1) / p.splits - first;
  const auto token_of = [first](int64_t i) { return (first + i) * kInputTokens; };

  wait_for_kernel_before();
  load_input_w1<T, NT, BD>(p, w1, column0);
  for (int s = 0; s < stages - 1; ++s) {
    if (s < count) {
      load_input_stage<T, NT, BD>(p, shared_address(ring) + s * Layout::kStageBytes, token_of(s),
                                  column0);
    }
    copy_commit();
  }
  float acc[Layout::kOuterRows][Layout::kOuterColumns][4] = {};
  int slot = 0, last_slot = stages - 1;
  for (int64_t i = 0; i < count; ++i) {
    copy_wait_stage(stages);
    __syncthreads();
    if (i > 0 && p.dx != nullptr) {
      store_input_gradient<T, NT, BD>(p, ring + last_slot * Layout::kStageBytes, token_of(i - 1),
                                      column0);
    }
    if (i + stages - 1 < count) {
      load_input_stage<T, NT, BD>(p, shared_address(ring) + last_slot * Layout::kStageBytes,
                                  token_of(i + stages - 1), column0);
    }
    copy_commit();
    unsigned char* stage = ring + slot * Layout::kStageBytes;
    if (p.dx != nullptr) input_gradient<T, NT, BD>(p, stage, w1, token_of(i));
    if (p.w1_partials != nullptr) add_outer<T, NT, BD>(shared_address(stage), acc);
    last_slot = slot;
    slot = slot + 1 == stages ? 0 : slot + 1;
  }
  copy_wait<0>();
  __syncthreads();
  if (count > 0 && p.dx != nullptr) {
    store_input_gradient<T, NT, BD>(p, ring + last_slot * Layout::kStageBytes, token_of(count - 1),
                                    column0);
  }
  if (p.w1_partials == nullptr) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 4, wn = warp / 4;
  float* partials = p.w1_partials + split * p.shape.hidden * p.shape.dim;
#pragma unroll
  for (int m = 0; m < NT / 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = wm * NT * 8 + m * 16 + lane / 4 + 8 * half;
#pragma unroll
      for (int n = 0; n < Layout::kOuterColumns; ++n) {
        const int64_t column = column0 + (wn * Layout::kOuterColumns + n) * 8 + lane % 4 * 2;
        if (row < p.shape.hidden && column < p.shape.dim) {
          *reinterpret_cast<float2*>(partials + row * p.shape.dim + column) = {
              acc[m][n][2 * half], acc[m][n][2 * half + 1]};
        }
      }
    }
  }
}

template <typename T, int NT, int BD>
cudaError_t input_backward_of(const ConnectionWeightsInputBackward& p, const Device& device,
                              cudaStream_t stream) {
  using Layout = InputLayout<NT, BD>;
  int stages = 4;
  while (stages > 2 && Layout::bytes(stages) > device.shared_bytes) --stages;
  const int64_t slices = (p.shape.dim + BD - 1) / BD;
  return launch_wide(weights_input_backward_kernel<T, NT, BD>, device, slices * p.splits, 1,
                     kWeightsThreads, Layout::bytes(stages), stream, p, stages);
}

template <typename T>
cudaError_t weights_input_backward(const ConnectionWeightsInputBackward& p, const Device& device,
                                   cudaStream_t stream) {
  switch (padded_hidden(p.shape.hidden) / 32) {
    case 2:
      return input_backward_of<T, 2, input_columns(64)>(p, device, stream);
    case 4:
      return input_backward_of<T, 4, input_columns(128)>(p, device, stream);
    case 6:
      return input_backward_of<T, 6, input_columns(192)>(p, device, stream);
    case 8:
      return input_backward_of<T, 8, input_columns(256)>(p, device, stream);
    default:
      return input_backward_of<T, 10, input_columns(320)>(p, device, stream);
  }
}

}  // namespace muddformer::kernels
