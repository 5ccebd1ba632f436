// See swiglu.h for the formula.
//
// A thread takes kPacks packs that lie a block's width apart: all their loads are under way before
// the first is used. Rows that follow one another are one long row.
#include <cstdint>
#include <limits>

#include "../common/launch.h"
#include "../common/pack.cuh"
#include "swiglu.h"

namespace muddformer::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kPacks = 2;

// Where pack number i of all rows is, in elements.
struct Place {
  uint32_t row, column;

  __device__ __forceinline__ int64_t at(int64_t stride) const { return row * stride + column; }
};

template <int E>
__device__ __forceinline__ Place place_of(uint32_t pack, uint32_t row_packs, bool one_row) {
  if (one_row) return {0, pack * E};
  const uint32_t row = pack / row_packs;
  return {row, (pack - row * row_packs) * E};
}

template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  const float below = 1.0f + exp_for<T>(-x);
  if constexpr (std::is_same_v<T, float>) return 1.0f / below;
  return __fdividef(1.0f, below);
}

template <typename T, int E>
__global__ void __launch_bounds__(kThreads)
    swiglu_kernel(const Swiglu p, uint32_t packs, uint32_t row_packs) {
  const bool one_row = p.rows == 1;
  float gate[kPacks][E], up[kPacks][E];
  const uint32_t first = blockIdx.x * kThreads * kPacks + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const uint32_t pack = first + k * kThreads;
    if (pack >= packs) break;
    const Place place = place_of<E>(pack, row_packs, one_row);
    load_pack<T, E>(static_cast<const T*>(p.gate) + place.at(p.gate_stride), gate[k]);
    load_pack<T, E>(static_cast<const T*>(p.up) + place.at(p.up_stride), up[k]);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const uint32_t pack = first + k * kThreads;
    if (pack >= packs) break;
#pragma unroll
    for (int i = 0; i < E; ++i) gate[k][i] *= sigmoid<T>(gate[k][i]) * up[k][i];
    store_pack<T, E>(static_cast<T*>(p.out) + static_cast<int64_t>(pack) * E, gate[k]);
  }
}

template <typename T, int E>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const SwigluBackward b, uint32_t packs, uint32_t row_packs) {
  const Swiglu& p = b.forward;
  const bool one_row = p.rows == 1;
  float gate[kPacks][E], up[kPacks][E], grad[kPacks][E];
  const uint32_t first = blockIdx.x * kThreads * kPacks + threadIdx.x;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const uint32_t pack = first + k * kThreads;
    if (pack >= packs) break;
    const Place place = place_of<E>(pack, row_packs, one_row);
    load_pack<T, E>(static_cast<const T*>(p.gate) + place.at(p.gate_stride), gate[k]);
    load_pack<T, E>(static_cast<const T*>(p.up) + place.at(p.up_stride), up[k]);
    load_pack<T, E>(static_cast<const T*>(b.grad) + place.at(b.grad_stride), grad[k]);
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const uint32_t pack = first + k * kThreads;
    if (pack >= packs) break;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      const float g = gate[k][i], s = sigmoid<T>(g), silu = g * s;
      gate[k][i] = grad[k][i] * up[k][i] * fmaf(silu, 1.0f - s, s);
      up[k][i] = grad[k][i] * silu;
    }
    const int64_t to = place_of<E>(pack, row_packs, one_row).at(b.grads_stride);
    store_pack<T, E>(static_cast<T*>(b.grad_gate) + to, gate[k]);
    store_pack<T, E>(static_cast<T*>(b.grad_up) + to, up[k]);
  }
}

// Whether rows of these strides are made of whole vectors.
template <typename T, typename... Strides>
bool whole_vectors(int64_t width, Strides... strides) {
  return ((strides % kVector<T> == 0) && ...) && width % kVector<T> == 0;
}

template <typename Kernel, typename Args>
cudaError_t launch(Kernel kernel, const Args& args, int64_t rows, int64_t width, int64_t entries,
                   cudaStream_t stream) {
  const int64_t row_packs = width / entries, packs = rows * row_packs;
  const int64_t blocks = (packs + kThreads * kPacks - 1) / (kThreads * kPacks);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args, static_cast<uint32_t>(packs),
                                                                 static_cast<uint32_t>(row_packs));
  return cudaGetLastError();
}

template <typename T>
cudaError_t forward(Swiglu p, cudaStream_t stream) {
  const void* const pointers[] = {p.gate, p.up, p.out};
  const bool vectors =
      aligned(pointers, 3) && whole_vectors<T>(p.width, p.gate_stride, p.up_stride);
  if (p.gate_stride == p.width && p.up_stride == p.width) {
    p.width *= p.rows;
    p.rows = 1;
  }
  if (vectors) {
    return launch(swiglu_kernel<T, kVector<T>>, p, p.rows, p.width, kVector<T>, stream);
  }
  return launch(swiglu_kernel<T, 1>, p, p.rows, p.width, 1, stream);
}

template <typename T>
cudaError_t backward(SwigluBackward b, cudaStream_t stream) {
  Swiglu& p = b.forward;
  const void* const pointers[] = {p.gate, p.up, b.grad, b.grad_gate, b.grad_up};
  const bool vectors = aligned(pointers, 5) && whole_vectors<T>(p.width, p.gate_stride, p.up_stride,
                                                                b.grad_stride, b.grads_stride);
  if (p.gate_stride == p.width && p.up_stride == p.width && b.grad_stride == p.width &&
      b.grads_stride == p.width) {
    p.width *= p.rows;
    p.rows = 1;
  }
  if (vectors) {
    return launch(swiglu_backward_kernel<T, kVector<T>>, b, p.rows, p.width, kVector<T>, stream);
  }
  return launch(swiglu_backward_kernel<T, 1>, b, p.rows, p.width, 1, stream);
}

bool has_work(const Swiglu& p) {
  return p.rows > 0 && p.width > 0;
}

cudaError_t check(const Swiglu& p) {
  if (p.rows < 0 || p.width < 0) return cudaErrorInvalidValue;
  // Places are counted in 32 bits, with room for the last block's end.
  const int64_t most = std::numeric_limits<uint32_t>::max() - kThreads * kPacks;
  if (has_work(p) && p.rows > most / p.width) return cudaErrorNotSupported;
  return cudaSuccess;
}

}  // namespace

cudaError_t launch_swiglu(const Swiglu& p, cudaStream_t stream) {
  if (const cudaError_t error = check(p); error != cudaSuccess || !has_work(p)) return error;
  switch (p.dtype) {
    case DType::Float32:
      return forward<float>(p, stream);
    case DType::BFloat16:
      return forward<__nv_bfloat16>(p, stream);
    case DType::Float16:
      return forward<__half>(p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

cudaError_t launch_swiglu_backward(const SwigluBackward& b, cudaStream_t stream) {
  const Swiglu& p = b.forward;
  if (const cudaError_t error = check(p); error != cudaSuccess || !has_work(p)) return error;
  switch (p.dtype) {
    case DType::Float32:
      return backward<float>(b, stream);
    case DType::BFloat16:
      return backward<__nv_bfloat16>(b, stream);
    case DType::Float16:
      return backward<__half>(b, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace muddformer::kernels
