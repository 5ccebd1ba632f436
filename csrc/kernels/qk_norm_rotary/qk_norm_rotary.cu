// See qk_norm_rotary.h for the formula.
//
// A head has the lanes of a part of a warp. A lane holds pairs of packs, entries i.. and i + half..
// that are rotated with each other, so that only the sums of the norm go from lane to lane. It has
// the same pairs of several heads of a token, which share cosines and sines. Of the entries that
// pass through neighbouring packs are a pair, with cosine 1 and sine 0.
//
// A block has queries or keys alone. The backward's blocks stay and walk over the tokens, so that
// a lane keeps the sums of dw in registers.
#include <algorithm>
#include <limits>

#include "../common/device.h"
#include "../common/launch.h"
#include "../common/partial_sums.h"
#include "heads.cuh"
#include "qk_norm_rotary.h"

namespace muddformer::kernels {
namespace {

template <typename T, int P, int V, bool kNorm>
__global__ void __launch_bounds__(kThreads, kBlocks)
    qk_norm_rotary_kernel(const __grid_constant__ QkNormRotary p,
                          const __grid_constant__ Splits splits) {
  constexpr int U = V > 1 ? 1 : kForwardHeads;
  const int which = blockIdx.x < splits.of[kQueries].blocks ? kQueries : kKeys;
  const Split& split = splits.of[which];
  const uint32_t block = blockIdx.x - (which == kKeys ? splits.of[kQueries].blocks : 0);
  const int lanes = split.lanes, lane = threadIdx.x % lanes;
  const uint32_t item = block * (kThreads / lanes) + threadIdx.x / lanes;
  const Item at = item_of(min(item, split.items - 1), split.groups, p.tokens);
  const int heads = item < split.items ? p.heads[which] : 0;

  float a[U][V][P], b[U][V][P];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int head = at.head + u * split.groups;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Pair pair = pair_of<P>(lane + k * lanes, p.half);
      if (head < heads && lane + k * lanes < split.lane_packs) {
        const T* const x = head_at<const T>(p.x[which], at, head);
        load_pack<T, P>(x + pair.first, a[u][k]);
        load_pack<T, P>(x + pair.second, b[u][k]);
      } else {
#pragma unroll
        for (int i = 0; i < P; ++i) a[u][k][i] = b[u][k][i] = 0.0f;
      }
    }
  }
  Angles<P, V> angles;
  angles.load(p, at, lane, lanes);
  float weight_a[V][P], weight_b[V][P];
  if constexpr (kNorm) {
    load_weight<T, P, V>(p, which, lane, lanes, split.lane_packs, weight_a, weight_b);
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    if constexpr (kNorm) {
      float square = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          square = fmaf(a[u][k][i], a[u][k][i], fmaf(b[u][k][i], b[u][k][i], square));
        }
      }
      const float rstd = rsqrtf(lane_sum(square, lanes) / static_cast<float>(p.head_dim) + p.eps);
#pragma unroll
      for (int k = 0; k < V; ++k) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          a[u][k][i] *= rstd * weight_a[k][i];
          b[u][k][i] *= rstd * weight_b[k][i];
        }
      }
    }
    const int head = at.head + u * split.groups;
    if (head >= heads) continue;
    T* const y = head_at<T>(p.y[which], at, head);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (lane + k * lanes >= split.lane_packs) continue;
      const Pair pair = pair_of<P>(lane + k * lanes, p.half);
      float first[P], second[P];
#pragma unroll
      for (int i = 0; i < P; ++i) {
        const float c = angles.cos[k][i], s = angles.sin[k][i];
        first[i] = a[u][k][i] * c - b[u][k][i] * s;
        second[i] = a[u][k][i] * s + b[u][k][i] * c;
      }
      store_pack<T, P>(y + pair.first, first);
      store_pack<T, P>(y + pair.second, second);
    }
  }
}

// Adds up what the lanes of a block that have the same pairs have, in their order, and leaves it
// for the second pass.
template <int P, int V>
__device__ __forceinline__ void leave_partial(const float (&first)[V][P],
                                              const float (&second)[V][P], const Split& split,
                                              int half, float* to) {
  __shared__ float of_thread[kThreads];
  const int lanes = split.lanes;
  for (int part = 0; part < 2 * V * P; ++part) {
    const int k = part / (2 * P), i = part % P;
    const bool is_second = part / P % 2 != 0;
    float value = 0.0f;
#pragma unroll
    for (int kk = 0; kk < V; ++kk) {
#pragma unroll
      for (int ii = 0; ii < P; ++ii) {
        if (kk == k && ii == i) value = is_second ? second[kk][ii] : first[kk][ii];
      }
    }
    of_thread[threadIdx.x] = value;
    __syncthreads();
    const int number = static_cast<int>(threadIdx.x) + k * lanes;
    if (threadIdx.x < lanes && number < split.lane_packs) {
      float sum = 0.0f;
      for (int j = threadIdx.x; j < kThreads; j += lanes) sum += of_thread[j];
      const Pair pair = pair_of<P>(number, half);
      to[(is_second ? pair.second : pair.first) + i] = sum;
    }
    __syncthreads();
  }
}

template <typename T, int P, int V, bool kNorm>
__global__ void __launch_bounds__(kThreads, kBlocks)
    qk_norm_rotary_backward_kernel(const __grid_constant__ QkNormRotaryBackward b,
                                   const __grid_constant__ Splits splits) {
  constexpr int U = V > 1 ? 1 : kBackwardHeads;
  const QkNormRotary& p = b.forward;
  const int which = blockIdx.x < splits.of[kQueries].blocks ? kQueries : kKeys;
  const Split& split = splits.of[which];
  const uint32_t block = blockIdx.x - (which == kKeys ? splits.of[kQueries].blocks : 0);
  const int lanes = split.lanes, lane = threadIdx.x % lanes;
  const float over_dim = 1.0f / static_cast<float>(p.head_dim);
  float weight_a[V][P], weight_b[V][P], grad_a[V][P] = {}, grad_b[V][P] = {};
  if constexpr (kNorm) {
    load_weight<T, P, V>(p, which, lane, lanes, split.lane_packs, weight_a, weight_b);
  }
  // All lanes of a warp stay together, because sums go from lane to lane.
  const uint32_t block_items = kThreads / lanes;
  for (uint64_t from = uint64_t{block} * block_items; from < split.items;
       from += uint64_t{split.blocks} * block_items) {
    const uint64_t item = from + threadIdx.x / lanes;
    const Item at = item_of(static_cast<uint32_t>(min(item, uint64_t{split.items - 1})),
                            split.groups, p.tokens);
    const int heads = item < split.items ? p.heads[which] : 0;
    float xa[U][V][P], xb[U][V][P], ya[U][V][P], yb[U][V][P];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int head = at.head + u * split.groups;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const Pair pair = pair_of<P>(lane + k * lanes, p.half);
        if (head < heads && lane + k * lanes < split.lane_packs) {
          const T* const dy = head_at<const T>(b.dy[which], at, head);
          load_pack<T, P>(dy + pair.first, ya[u][k]);
          load_pack<T, P>(dy + pair.second, yb[u][k]);
          if constexpr (kNorm) {
            const T* const x = head_at<const T>(p.x[which], at, head);
            load_pack<T, P>(x + pair.first, xa[u][k]);
            load_pack<T, P>(x + pair.second, xb[u][k]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < P; ++i) {
            xa[u][k][i] = xb[u][k][i] = ya[u][k][i] = yb[u][k][i] = 0.0f;
          }
        }
      }
    }
    Angles<P, V> angles;
    angles.load(p, at, lane, lanes);
#pragma unroll
    for (int u = 0; u < U; ++u) {
      float square = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const float c = angles.cos[k][i], s = angles.sin[k][i];
          const float first = ya[u][k][i] * c + yb[u][k][i] * s;
          yb[u][k][i] = yb[u][k][i] * c - ya[u][k][i] * s;
          ya[u][k][i] = first;
          if constexpr (kNorm) {
            square = fmaf(xa[u][k][i], xa[u][k][i], fmaf(xb[u][k][i], xb[u][k][i], square));
          }
        }
      }
      if constexpr (kNorm) {
        const float rstd = rsqrtf(lane_sum(square, lanes) * over_dim + p.eps);
        float along = 0.0f;
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int i = 0; i < P; ++i) {
            xa[u][k][i] *= rstd;
            xb[u][k][i] *= rstd;
            grad_a[k][i] = fmaf(ya[u][k][i], xa[u][k][i], grad_a[k][i]);
            grad_b[k][i] = fmaf(yb[u][k][i], xb[u][k][i], grad_b[k][i]);
            ya[u][k][i] *= weight_a[k][i];
            yb[u][k][i] *= weight_b[k][i];
            along = fmaf(ya[u][k][i], xa[u][k][i], fmaf(yb[u][k][i], xb[u][k][i], along));
          }
        }
        along = lane_sum(along, lanes) * over_dim;
#pragma unroll
        for (int k = 0; k < V; ++k) {
#pragma unroll
          for (int i = 0; i < P; ++i) {
            ya[u][k][i] = rstd * (ya[u][k][i] - along * xa[u][k][i]);
            yb[u][k][i] = rstd * (yb[u][k][i] - along * xb[u][k][i]);
          }
        }
      }
      const int head = at.head + u * split.groups;
      if (head >= heads) continue;
      T* const dx = head_at<T>(b.dx[which], at, head);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (lane + k * lanes >= split.lane_packs) continue;
        const Pair pair = pair_of<P>(lane + k * lanes, p.half);
        store_pack<T, P>(dx + pair.first, ya[u][k]);
        store_pack<T, P>(dx + pair.second, yb[u][k]);
      }
    }
  }
  if constexpr (kNorm) {
    // Queries' sums first, then those of the keys: each block has one place.
    leave_partial<P, V>(grad_a, grad_b, split, p.half,
                        b.workspace + static_cast<int64_t>(blockIdx.x) * p.head_dim);
  }
}

bool whole_packs(const QkNormRotary& p, const Heads& heads, int pack) {
  return heads.data == nullptr ||
         (aligned(heads.data) && heads.batch_stride % pack == 0 && heads.token_stride % pack == 0 &&
          heads.head_stride % pack == 0 && p.head_dim % (2 * pack) == 0);
}

bool has_packs(const QkNormRotary& p, int pack) {
  const bool angles = aligned(p.cos) && aligned(p.sin) && p.rotary_batch_stride % 4 == 0 &&
                      p.rotary_token_stride % 4 == 0;
  return angles && p.half % pack == 0 && p.head_dim % (2 * pack) == 0 &&
         whole_packs(p, p.x[0], pack) && whole_packs(p, p.x[1], pack) &&
         whole_packs(p, p.y[0], pack) && whole_packs(p, p.y[1], pack);
}

bool has_packs(const QkNormRotaryBackward& b, int pack) {
  return has_packs(b.forward, pack) && whole_packs(b.forward, b.dy[0], pack) &&
         whole_packs(b.forward, b.dy[1], pack) && whole_packs(b.forward, b.dx[0], pack) &&
         whole_packs(b.forward, b.dx[1], pack);
}

// most_blocks: of queries and keys together; 0: as many as there is work for.
cudaError_t split_heads(const QkNormRotary& p, int pack, int packs_each, int heads_each,
                        uint32_t most_blocks, Splits& splits) {
  const int pairs = p.head_dim / (2 * pack);
  int lanes = 1;
  while (lanes * packs_each < pairs) lanes *= 2;
  const int64_t tokens = p.batch * p.tokens, block_items = kThreads / lanes;
  const int64_t heads = p.heads[kQueries] + p.heads[kKeys];
  for (int which : {kQueries, kKeys}) {
    const int64_t groups = (p.heads[which] + heads_each - 1) / heads_each;
    const int64_t items = tokens * groups;
    if (items > std::numeric_limits<uint32_t>::max() - kThreads) return cudaErrorNotSupported;
    int64_t blocks = (items + block_items - 1) / block_items;
    if (most_blocks > 0) {
      blocks = std::min(blocks, std::max<int64_t>(most_blocks * p.heads[which] / heads, 1));
    }
    splits.of[which] = {lanes, pairs, static_cast<uint32_t>(groups), static_cast<uint32_t>(items),
                        static_cast<uint32_t>(blocks)};
  }
  return cudaSuccess;
}

template <typename T, int P, int V, bool kNorm>
cudaError_t launch(const QkNormRotary& p, const Device&, cudaStream_t stream) {
  Splits splits{};
  const cudaError_t error = split_heads(p, P, V, V > 1 ? 1 : kForwardHeads, 0, splits);
  if (error != cudaSuccess) return error;
  const uint32_t blocks = splits.of[kQueries].blocks + splits.of[kKeys].blocks;
  qk_norm_rotary_kernel<T, P, V, kNorm><<<blocks, kThreads, 0, stream>>>(p, splits);
  return cudaGetLastError();
}

template <typename T, int P, int V, bool kNorm>
cudaError_t launch(const QkNormRotaryBackward& b, const Device& device, cudaStream_t stream) {
  const QkNormRotary& p = b.forward;
  Splits splits{};
  const uint32_t most = kNorm ? static_cast<uint32_t>(kBlocks * device.multiprocessors) : 0;
  const cudaError_t refused = split_heads(p, P, V, V > 1 ? 1 : kBackwardHeads, most, splits);
  if (refused != cudaSuccess) return refused;
  const uint32_t blocks = splits.of[kQueries].blocks + splits.of[kKeys].blocks;
  qk_norm_rotary_backward_kernel<T, P, V, kNorm><<<blocks, kThreads, 0, stream>>>(b, splits);
  cudaError_t error = cudaGetLastError();
  if (!kNorm) return error;
  const float* from = b.workspace;
  for (int which : {kQueries, kKeys}) {
    const int count = static_cast<int>(splits.of[which].blocks);
    PartialSums sums{from,       {b.grad_weight[which]},           1, count,
                     p.head_dim, p.wide ? DType::Float32 : p.dtype};
    if (error == cudaSuccess && b.grad_weight[which] != nullptr) {
      error = launch_partial_sums(sums, stream);
    }
    from += static_cast<int64_t>(count) * p.head_dim;
  }
  return error;
}

template <typename T, int P, int V, typename Args>
cudaError_t with_norms(const Args& args, bool norms, const Device& device, cudaStream_t stream) {
  return norms ? launch<T, P, V, true>(args, device, stream)
               : launch<T, P, V, false>(args, device, stream);
}

template <typename T, typename Args>
cudaError_t with_packs(const Args& args, const QkNormRotary& p, const Device& device,
                       cudaStream_t stream) {
  const bool norms = p.weight[kQueries] != nullptr;
  if (has_packs(args, kVector<T>)) {
    if (p.head_dim > 64 * kVector<T>) return cudaErrorNotSupported;
    return with_norms<T, kVector<T>, 1>(args, norms, device, stream);
  }
  if (p.head_dim > 256) return cudaErrorNotSupported;
  return with_norms<T, 1, 4>(args, norms, device, stream);
}

template <typename Args>
cudaError_t dispatch(const Args& args, const QkNormRotary& p, cudaStream_t stream) {
  if (p.batch < 0 || p.tokens < 0 || p.heads[0] < 1 || p.heads[1] < 1 || p.head_dim < 1 ||
      p.half < 0 || 2 * p.half > p.head_dim ||
      (p.weight[0] == nullptr) != (p.weight[1] == nullptr)) {
    return cudaErrorInvalidValue;
  }
  if (p.head_dim % 2 != 0 || p.tokens > INT_MAX || p.batch > INT_MAX) return cudaErrorNotSupported;
  if (p.batch * p.tokens == 0) return cudaSuccess;
  Device device{};
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  switch (p.dtype) {
    case DType::Float32:
      return with_packs<float>(args, p, device, stream);
    case DType::BFloat16:
      return with_packs<__nv_bfloat16>(args, p, device, stream);
    case DType::Float16:
      return with_packs<__half>(args, p, device, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t qk_norm_rotary_workspace(const QkNormRotaryBackward& b, int64_t& floats) {
  Device device{};
  const cudaError_t error = current_device(device);
  const bool norms = b.forward.weight[kQueries] != nullptr;
  floats = norms ? (int64_t{kBlocks} * device.multiprocessors + 2) * b.forward.head_dim : 0;
  return error;
}

cudaError_t launch_qk_norm_rotary(const QkNormRotary& p, cudaStream_t stream) {
  return dispatch(p, p, stream);
}

cudaError_t launch_qk_norm_rotary_backward(const QkNormRotaryBackward& b, cudaStream_t stream) {
  return dispatch(b, b.forward, stream);
}

}  // namespace muddformer::kernels
