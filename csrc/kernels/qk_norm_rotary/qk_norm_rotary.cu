// See qk_norm_rotary.h for the formula.
//
// A head has the lanes of a part of a warp: a power of two, or fewer where more heads then have room
// (a 16-bit head of 80: five lanes, six side by side in a warp). A lane holds pairs of packs,
// entries i.. and i + half.. that are rotated with each other, so that only the sums of the norm go
// from lane to lane. It has the same pairs of several heads of a token, which share cosines and
// sines. Of the entries that pass through neighbouring packs are a pair, with cosine 1 and sine 0.
//
// A block has queries or keys alone. The backward of the norms has blocks that stay and walk over
// the tokens, so that a lane keeps the sums of dw in registers. Each lane asks early for what it
// needs next, into places of its own in shared memory, so that no lane waits for another.
//
// Without norms the backward is the forward with the rotation turned round.
#include <algorithm>
#include <limits>

#include "../common/cluster.cuh"
#include "../common/device.h"
#include "../common/launch.h"
#include "../common/partial_sums.h"
#include "heads.cuh"
#include "qk_norm_rotary.h"

namespace muddformer::kernels {
namespace {

template <typename T, int P, int V, bool kNorm, bool kHalves>
__global__ void __launch_bounds__(kForward<kNorm>.threads, kForward<kNorm>.blocks)
    qk_norm_rotary_kernel(const __grid_constant__ QkNormRotary p,
                          const __grid_constant__ Splits splits, float direction) {
  constexpr int U = V > 1 ? 1 : kForward<kNorm>.heads;
  const int which = blockIdx.x < splits.of[kQueries].blocks ? kQueries : kKeys;
  const Split& split = splits.of[which];
  const uint32_t block = blockIdx.x - (which == kKeys ? splits.of[kQueries].blocks : 0);
  const int lanes = split.lanes, lane = threadIdx.x % 32 % lanes;
  const uint64_t item =
      uint64_t{block} * (kForward<kNorm>.threads / 32 * split.warp_items) + item_in_block(split);
  const Item at =
      item_of(static_cast<uint32_t>(min(item, uint64_t{split.items - 1})), split.groups, p.tokens);
  const int heads = item < split.items ? p.heads[which] : 0;

  PackBits<T, P> bits[U][V][2];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int head = at.head + u * split.groups;
    const T* const x = head_at<const T>(p.x[which], at, head);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      bits[u][k][0] = bits[u][k][1] = PackBits<T, P>{};
      if (head >= heads || lane + k * lanes >= split.lane_packs) continue;
      const Pair pair = pair_of<P>(lane + k * lanes, p.half);
      bits[u][k][0] = load_bits<T, P>(x + pair.first);
      bits[u][k][1] = load_bits<T, P>(x + pair.second);
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
    float a[V][P], b[V][P];
    float square = 0.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      unpack_bits<T, P>(bits[u][k][0], a[k]);
      unpack_bits<T, P>(bits[u][k][1], b[k]);
#pragma unroll
      for (int i = 0; i < P; ++i) {
        square = fmaf(a[k][i], a[k][i], fmaf(b[k][i], b[k][i], square));
      }
    }
    float rstd = 1.0f;
    if constexpr (kNorm) {
      rstd =
          rsqrtf(lane_sum<kHalves>(square, lane, lanes) / static_cast<float>(p.head_dim) + p.eps);
    }
    const int head = at.head + u * split.groups;
    if (head >= heads) continue;
    T* const y = head_at<T>(p.y[which], at, head);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      if (lane + k * lanes >= split.lane_packs) continue;
      const Pair pair = pair_of<P>(lane + k * lanes, p.half);
#pragma unroll
      for (int i = 0; i < P; ++i) {
        if constexpr (kNorm) {
          a[k][i] *= rstd * weight_a[k][i];
          b[k][i] *= rstd * weight_b[k][i];
        }
        const float c = angles.cos[k][i], s = angles.sin[k][i] * direction;
        const float first = a[k][i] * c - b[k][i] * s;
        b[k][i] = a[k][i] * s + b[k][i] * c;
        a[k][i] = first;
      }
      store_pack<T, P>(y + pair.first, a[k]);
      store_pack<T, P>(y + pair.second, b[k]);
    }
  }
}

// Adds up what the lanes of a block that have the same pairs have, in a fixed order, and leaves it
// for the second pass. of_warps: [warps][E] in shared memory.
template <int P, int V>
__device__ __forceinline__ void leave_partial(float (&first)[V][P], float (&second)[V][P],
                                              const Split& split, const QkNormRotary& p,
                                              float* of_warps, float* to) {
  const int lanes = split.lanes, lane = threadIdx.x % 32, place = lane / lanes;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int number = lane + k * lanes;
    const Pair pair = pair_of<P>(number, p.half);
    float* const own = of_warps + threadIdx.x / 32 * p.head_dim;
#pragma unroll
    for (int i = 0; i < P; ++i) {
      for (int left = split.warp_items; left > 1; left = (left + 1) / 2) {
        const int kept = (left + 1) / 2;
        const float above_first = __shfl_down_sync(0xffffffffu, first[k][i], kept * lanes);
        const float above_second = __shfl_down_sync(0xffffffffu, second[k][i], kept * lanes);
        if (place + kept >= left) continue;
        first[k][i] += above_first;
        second[k][i] += above_second;
      }
      if (lane < lanes && number < split.lane_packs) {
        own[pair.first + i] = first[k][i];
        own[pair.second + i] = second[k][i];
      }
    }
  }
  __syncthreads();
  for (int column = threadIdx.x; column < p.head_dim; column += kBackward.threads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kBackward.threads / 32; ++warp)
      sum += of_warps[warp * p.head_dim + column];
    to[column] = sum;
  }
}

template <typename T, int P, int V, bool kHalves>
__global__ void __launch_bounds__(kBackward.threads, kBackward.blocks)
    qk_norm_rotary_backward_kernel(const __grid_constant__ QkNormRotaryBackward b,
                                   const __grid_constant__ Splits splits) {
  constexpr int U = V > 1 ? 1 : kBackward.heads;
  using Bits = PackBits<T, P>;
  const QkNormRotary& p = b.forward;
  const int which = blockIdx.x < splits.of[kQueries].blocks ? kQueries : kKeys;
  const Split& split = splits.of[which];
  const uint32_t block = blockIdx.x - (which == kKeys ? splits.of[kQueries].blocks : 0);
  const int lanes = split.lanes, lane = threadIdx.x % 32 % lanes;
  const float over_dim = 1.0f / static_cast<float>(p.head_dim);
  float weight_a[V][P], weight_b[V][P], grad_a[V][P] = {}, grad_b[V][P] = {};
  load_weight<T, P, V>(p, which, lane, lanes, split.lane_packs, weight_a, weight_b);

  // Four packs for each pair of a lane: of dy, and of x.
  extern __shared__ __align__(16) unsigned char shared[];
  const auto place = [&](int stage, int u, int k) {
    return reinterpret_cast<Bits*>(shared) + ((stage * U + u) * V + k) * 4 * kBackward.threads +
           threadIdx.x;
  };
  const uint32_t block_items = kBackward.threads / 32 * split.warp_items;
  const uint64_t own = item_in_block(split);
  const uint64_t step = uint64_t{split.blocks} * block_items;
  const auto ask = [&](uint64_t from, int stage) {
    const uint64_t item = from + own;
    if (item < split.items) {
      const Item at = item_of(static_cast<uint32_t>(item), split.groups, p.tokens);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int head = at.head + u * split.groups;
        const T* const dy = head_at<const T>(b.dy[which], at, head);
        const T* const x = head_at<const T>(p.x[which], at, head);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (head >= p.heads[which] || lane + k * lanes >= split.lane_packs) continue;
          const Pair pair = pair_of<P>(lane + k * lanes, p.half);
          Bits* const to = place(stage, u, k);
          copy_bits<T, P>(to, dy + pair.first);
          copy_bits<T, P>(to + kBackward.threads, dy + pair.second);
          copy_bits<T, P>(to + 2 * kBackward.threads, x + pair.first);
          copy_bits<T, P>(to + 3 * kBackward.threads, x + pair.second);
        }
      }
    }
    copy_commit();
  };

  const uint64_t begin = uint64_t{block} * block_items;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) ask(begin + stage * step, stage);
  int stage = 0;
  // All lanes of a warp stay together, because sums go from lane to lane.
  for (uint64_t from = begin; from < split.items; from += step) {
    ask(from + (kStages - 1) * step, stage == 0 ? kStages - 1 : stage - 1);
    const uint64_t item = from + own;
    const Item at = item_of(static_cast<uint32_t>(min(item, uint64_t{split.items - 1})),
                            split.groups, p.tokens);
    const int heads = item < split.items ? p.heads[which] : 0;
    Angles<P, V> angles;
    angles.load(p, at, lane, lanes);
    copy_wait<kStages - 1>();
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int head = at.head + u * split.groups;
      float xa[V][P], xb[V][P], ya[V][P], yb[V][P];
      float square = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (head < heads && lane + k * lanes < split.lane_packs) {
          const Bits* const bits = place(stage, u, k);
          unpack_bits<T, P>(bits[0], ya[k]);
          unpack_bits<T, P>(bits[kBackward.threads], yb[k]);
          unpack_bits<T, P>(bits[2 * kBackward.threads], xa[k]);
          unpack_bits<T, P>(bits[3 * kBackward.threads], xb[k]);
        } else {
#pragma unroll
          for (int i = 0; i < P; ++i) xa[k][i] = xb[k][i] = ya[k][i] = yb[k][i] = 0.0f;
        }
#pragma unroll
        for (int i = 0; i < P; ++i) {
          const float c = angles.cos[k][i], s = angles.sin[k][i];
          const float first = ya[k][i] * c + yb[k][i] * s;
          yb[k][i] = yb[k][i] * c - ya[k][i] * s;
          ya[k][i] = first;
          square = fmaf(xa[k][i], xa[k][i], fmaf(xb[k][i], xb[k][i], square));
        }
      }
      const float rstd = rsqrtf(lane_sum<kHalves>(square, lane, lanes) * over_dim + p.eps);
      float along = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) {
#pragma unroll
        for (int i = 0; i < P; ++i) {
          xa[k][i] *= rstd;
          xb[k][i] *= rstd;
          grad_a[k][i] = fmaf(ya[k][i], xa[k][i], grad_a[k][i]);
          grad_b[k][i] = fmaf(yb[k][i], xb[k][i], grad_b[k][i]);
          ya[k][i] *= weight_a[k][i];
          yb[k][i] *= weight_b[k][i];
          along = fmaf(ya[k][i], xa[k][i], fmaf(yb[k][i], xb[k][i], along));
        }
      }
      along = lane_sum<kHalves>(along, lane, lanes) * over_dim;
      if (head >= heads) continue;
      T* const dx = head_at<T>(b.dx[which], at, head);
#pragma unroll
      for (int k = 0; k < V; ++k) {
        if (lane + k * lanes >= split.lane_packs) continue;
#pragma unroll
        for (int i = 0; i < P; ++i) {
          ya[k][i] = rstd * (ya[k][i] - along * xa[k][i]);
          yb[k][i] = rstd * (yb[k][i] - along * xb[k][i]);
        }
        const Pair pair = pair_of<P>(lane + k * lanes, p.half);
        store_pack<T, P>(dx + pair.first, ya[k]);
        store_pack<T, P>(dx + pair.second, yb[k]);
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  let_next_kernel_come();
  // Queries' sums first, then those of the keys: each block has one place.
  leave_partial<P, V>(grad_a, grad_b, split, p, reinterpret_cast<float*>(shared),
                      b.workspace + static_cast<int64_t>(blockIdx.x) * p.head_dim);
}

bool whole_packs(const QkNormRotary& p, const Heads& heads, int pack) {
  return heads.data == nullptr ||
         (aligned(heads.data) && heads.batch_stride % pack == 0 && heads.token_stride % pack == 0 &&
          heads.head_stride % pack == 0 && p.head_dim % (2 * pack) == 0);
}

bool has_packs(const QkNormRotary& p, int pack) {
  const bool angles = aligned(p.cos) && aligned(p.sin) && p.rotary_batch_stride % 4 == 0 &&
                      p.rotary_token_stride % 4 == 0;
  const bool weights = aligned(p.weight[0]) && aligned(p.weight[1]);
  return angles && weights && p.half % pack == 0 && p.head_dim % (2 * pack) == 0 &&
         whole_packs(p, p.x[0], pack) && whole_packs(p, p.x[1], pack) &&
         whole_packs(p, p.y[0], pack) && whole_packs(p, p.y[1], pack);
}

bool has_packs(const QkNormRotaryBackward& b, int pack) {
  return has_packs(b.forward, pack) && whole_packs(b.forward, b.dy[0], pack) &&
         whole_packs(b.forward, b.dy[1], pack) && whole_packs(b.forward, b.dx[0], pack) &&
         whole_packs(b.forward, b.dx[1], pack);
}

// most_blocks: of queries and keys together; 0: as many as there is work for.
cudaError_t split_heads(const QkNormRotary& p, int pack, int packs_each, const HeadLaunch& launch,
                        uint32_t most_blocks, Splits& splits) {
  const int heads_each = packs_each > 1 ? 1 : launch.heads, threads = launch.threads;
  const int pairs = p.head_dim / (2 * pack);
  const int fewest = (pairs + packs_each - 1) / packs_each;
  int lanes = 1;
  while (lanes < fewest) lanes *= 2;
  if (32 / fewest > 32 / lanes) lanes = fewest;
  const int warp_items = 32 / lanes;
  const int64_t tokens = p.batch * p.tokens, block_items = threads / 32 * warp_items;
  const int64_t heads = p.heads[kQueries] + p.heads[kKeys];
  for (int which : {kQueries, kKeys}) {
    const int64_t groups = (p.heads[which] + heads_each - 1) / heads_each;
    const int64_t items = tokens * groups;
    if (items > std::numeric_limits<uint32_t>::max() - threads) return cudaErrorNotSupported;
    int64_t blocks = (items + block_items - 1) / block_items;
    if (most_blocks > 0) {
      blocks = std::min(blocks, std::max<int64_t>(most_blocks * p.heads[which] / heads, 1));
    }
    splits.of[which] = {lanes,
                        warp_items,
                        pairs,
                        static_cast<uint32_t>(groups),
                        static_cast<uint32_t>(items),
                        static_cast<uint32_t>(blocks)};
  }
  return cudaSuccess;
}

// Whether the lanes of a head are a power of two: sums then take fewer steps.
bool halves(const Splits& splits) {
  const int lanes = splits.of[kQueries].lanes;
  return (lanes & (lanes - 1)) == 0;
}

// direction: 1, or -1 to rotate back.
template <typename T, int P, int V, bool kNorm>
cudaError_t launch(const QkNormRotary& p, float direction, cudaStream_t stream) {
  Splits splits{};
  const cudaError_t error = split_heads(p, P, V, kForward<kNorm>, 0, splits);
  if (error != cudaSuccess) return error;
  const uint32_t blocks = splits.of[kQueries].blocks + splits.of[kKeys].blocks;
  const auto kernel = halves(splits) ? qk_norm_rotary_kernel < T, P, V, kNorm,
             kNorm && V == 1 >       : qk_norm_rotary_kernel<T, P, V, kNorm, false>;
  kernel<<<blocks, kForward<kNorm>.threads, 0, stream>>>(p, splits, direction);
  return cudaGetLastError();
}

template <typename T, int P, int V>
cudaError_t launch(const QkNormRotary& p, cudaStream_t stream) {
  return p.weight[kQueries] != nullptr ? launch<T, P, V, true>(p, 1.0f, stream)
                                       : launch<T, P, V, false>(p, 1.0f, stream);
}

template <typename T, int P, int V>
cudaError_t launch(const QkNormRotaryBackward& b, cudaStream_t stream) {
  const QkNormRotary& p = b.forward;
  if (p.weight[kQueries] == nullptr) {
    QkNormRotary back = p;
    for (int which : {kQueries, kKeys}) {
      back.x[which] = b.dy[which];
      back.y[which] = b.dx[which];
    }
    return launch<T, P, V, false>(back, -1.0f, stream);
  }
  Device device{};
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  constexpr int U = V > 1 ? 1 : kBackward.heads;
  Splits splits{};
  const auto most = static_cast<uint32_t>(kBackward.blocks * device.multiprocessors);
  error = split_heads(p, P, V, kBackward, most, splits);
  if (error != cudaSuccess) return error;
  const size_t places = kStages * U * V * 4 * kBackward.threads * sizeof(PackBits<T, P>);
  const size_t sums = kBackward.threads / 32 * p.head_dim * sizeof(float);
  const size_t shared_bytes = std::max(places, sums);
  const auto kernel = halves(splits) ? qk_norm_rotary_backward_kernel<T, P, V, V == 1>
                                     : qk_norm_rotary_backward_kernel<T, P, V, false>;
  error = allow_shared_bytes(kernel, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  const uint32_t blocks = splits.of[kQueries].blocks + splits.of[kKeys].blocks;
  kernel<<<blocks, kBackward.threads, shared_bytes, stream>>>(b, splits);
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  const auto of_queries = static_cast<int>(splits.of[kQueries].blocks);
  PartialSums sums_of_blocks{};
  sums_of_blocks.sums[kQueries] = {b.workspace, p.head_dim, of_queries, b.grad_weight[kQueries]};
  sums_of_blocks.sums[kKeys] = {b.workspace + int64_t{of_queries} * p.head_dim, p.head_dim,
                                static_cast<int>(splits.of[kKeys].blocks), b.grad_weight[kKeys]};
  sums_of_blocks.dim = p.head_dim;
  sums_of_blocks.dtype = p.wide ? DType::Float32 : p.dtype;
  return launch_partial_sums(sums_of_blocks, device, stream);
}

template <typename T, typename Args>
cudaError_t with_packs(const Args& args, const QkNormRotary& p, cudaStream_t stream) {
  if (has_packs(args, kVector<T>)) {
    if (p.head_dim > 64 * kVector<T>) return cudaErrorNotSupported;
    return launch<T, kVector<T>, 1>(args, stream);
  }
  if (p.head_dim > 256) return cudaErrorNotSupported;
  return launch<T, 1, 4>(args, stream);
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
  switch (p.dtype) {
    case DType::Float32:
      return with_packs<float>(args, p, stream);
    case DType::BFloat16:
      return with_packs<__nv_bfloat16>(args, p, stream);
    case DType::Float16:
      return with_packs<__half>(args, p, stream);
    default:
      return cudaErrorNotSupported;
  }
}

}  // namespace

cudaError_t qk_norm_rotary_workspace(const QkNormRotaryBackward& b, int64_t& floats) {
  Device device{};
  const cudaError_t error = current_device(device);
  const bool norms = b.forward.weight[kQueries] != nullptr;
  floats =
      norms ? (int64_t{kBackward.blocks} * device.multiprocessors + 2) * b.forward.head_dim : 0;
  return error;
}

cudaError_t launch_qk_norm_rotary(const QkNormRotary& p, cudaStream_t stream) {
  return dispatch(p, p, stream);
}

cudaError_t launch_qk_norm_rotary_backward(const QkNormRotaryBackward& b, cudaStream_t stream) {
  return dispatch(b, b.forward, stream);
}

}  // namespace muddformer::kernels
