// Forward of the connection weights, its second half, which every kernel shares: from the sums x
// W1^T and the sums of squares in shared memory to h and A.
//
// The blocks of a cluster add their sums in the order of their ranks: of the four 16-row tiles of
// each 64 tokens a block finishes 4 / CL, reading the other blocks' shared memory. GELU(h) stays in
// shared memory for the second product, for which the 8 warps stand 2 x 4 over tokens and outputs.
#pragma once

#include "../common/cluster.cuh"
#include "../common/gelu.cuh"
#include "../common/tensor_core.cuh"
#include "connection_weights.h"
#include "launch.h"

namespace muddformer::kernels {

inline constexpr int kForwardTokens = 128;
inline constexpr int kForwardStep = 64;     // columns of D in a stage
inline constexpr int kForwardOutputs = 64;  // rows of W2 in shared memory at a time, twice

// Where things lie in shared memory: the sums of squares and the prior in float32, then the stages,
// which give way to what the epilogue needs.
template <int NT, int CL>
struct ForwardLayout {
  static constexpr int kPadded = 32 * NT;
  static constexpr int kPrior = kForwardTokens * 4;  // after the squares
  static constexpr int kStages = 2048;
  static constexpr int kX = 0;  // in a stage
  static constexpr int kW1 = kForwardTokens * kForwardStep * 2;
  static constexpr int kStageBytes = kW1 + kPadded * kForwardStep * 2;
  static constexpr int kSums = kStages;  // [128][kPadded] in float32
  static constexpr int kSumsBytes = kForwardTokens * kPadded * 4;
  static constexpr int kGelu = kSums + kSumsBytes;  // [128 / CL][kPadded]
  static constexpr int kGeluEnd = kGelu + kForwardTokens / CL * kPadded * 2;
  // W2 has room of its own, or takes the place of the sums.
  static constexpr bool kW2Waits = NT > 6;
  static constexpr int kW2 = kW2Waits ? kSums : kGeluEnd;
  static constexpr int kW2Bytes = kForwardOutputs * kPadded * 2;
  static constexpr int kEpilogueBytes = kGeluEnd + (kW2Waits ? 0 : 2 * kW2Bytes);

  static constexpr int bytes(int stages) {
    const int ring = kStages + stages * kStageBytes;
    return ring > kEpilogueBytes ? ring : kEpilogueBytes;
  }
};

// Rows [64 * part, + 64) of W2.
template <typename T, int NT>
__device__ __forceinline__ void load_w2(const ConnectionWeightsForward& p, uint32_t tile,
                                        int part) {
  constexpr int kChunks = 4 * NT;  // of a row
  const T* w2 = static_cast<const T*>(p.w2);
#pragma unroll
  for (int i = 0; i < NT; ++i) {
    const int index = threadIdx.x + i * kWeightsThreads;
    const int row = index / kChunks, chunk = index % kChunks;
    const int output = part * kForwardOutputs + row;
    const bool valid = output < p.shape.outputs && chunk * 8 < p.shape.hidden;
    copy_async(tile + swizzled_pairs(row, chunk, kChunks * 16),
               valid ? w2 + static_cast<int64_t>(output) * p.shape.hidden + chunk * 8 : w2, valid);
  }
}

// From the sums of all blocks of the cluster to h, r and GELU(h) of the rows that this block
// finishes, 2 * CL threads a row.
template <typename T, int NT, int CL>
__device__ __forceinline__ void finish_hidden(const ConnectionWeightsForward& p,
                                              unsigned char* shared, int64_t token0, int rank) {
  using Layout = ForwardLayout<NT, CL>;
  constexpr int kGroup = 64 / CL;  // rows of each 64 that one block finishes
  const int own_row = threadIdx.x / (2 * CL);
  const int row = own_row / kGroup * 64 + rank * kGroup + own_row % kGroup;
  uint32_t block[CL];
#pragma unroll
  for (int q = 0; q < CL; ++q) block[q] = address_of_rank(shared_address(shared), q);
  const auto four_of = [&](int chunk, int q) {
    const uint32_t place = Layout::kSums + swizzled(row, chunk, 128 * NT);
    return CL > 1 ? load_four_of_cluster(block[q] + place)
                  : *reinterpret_cast<const float4*>(shared + place);
  };
  float squares = 0;
#pragma unroll
  for (int q = 0; q < CL; ++q) {
    squares += CL > 1 ? load_of_cluster(block[q] + row * 4) : reinterpret_cast<float*>(shared)[row];
  }
  const int64_t token = token0 + row;
  const bool valid = token < p.shape.tokens;
  const float factor = rsqrtf(squares / static_cast<float>(p.shape.dim) + p.eps);
  if (valid && p.factor != nullptr && threadIdx.x % (2 * CL) == 0) p.factor[token] = factor;
#pragma unroll 3
  for (int chunk = threadIdx.x % (2 * CL); chunk < 4 * NT; chunk += 2 * CL) {
    float h[8] = {};
#pragma unroll
    for (int q = 0; q < CL; ++q) {
      const float4 low = four_of(2 * chunk, q), high = four_of(2 * chunk + 1, q);
      const float sums[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) h[i] += sums[i];
    }
#pragma unroll
    for (float& v : h) v *= factor;
    const uint4 rounded = pack<T>(h);
    if (valid && p.hidden != nullptr && chunk * 8 < p.shape.hidden) {
      *reinterpret_cast<uint4*>(static_cast<T*>(p.hidden) + token * p.shape.hidden + chunk * 8) =
          rounded;
    }
    unpack<T>(rounded, h);
    gelu(h, p.shape.gelu_tanh);
    *reinterpret_cast<uint4*>(shared + Layout::kGelu + swizzled(own_row, chunk, 64 * NT)) =
        pack<T>(h);
  }
}

// A = GELU(h) W2^T + prior for the rows that this block finishes, 64 outputs at a time.
template <typename T, int NT, int CL>
__device__ __forceinline__ void forward_outputs(const ConnectionWeightsForward& p, uint32_t base,
                                                const float* priors, int64_t token0, int rank) {
  using Layout = ForwardLayout<NT, CL>;
  constexpr int kTiles = 4 / CL, kRowBytes = Layout::kPadded * 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % 2, wn = warp / 2;
  const int outputs = p.shape.outputs;
  const int parts = (outputs + kForwardOutputs - 1) / kForwardOutputs;
  const bool fours = outputs % 4 == 0 && reinterpret_cast<uintptr_t>(p.weights) % 8 == 0;
  for (int part = 0; part < parts; ++part) {
    copy_wait<0>();
    __syncthreads();
    if (part + 1 < parts) {
      load_w2<T, NT>(p, base + Layout::kW2 + (part + 1) % 2 * Layout::kW2Bytes, part + 1);
      copy_commit();
    }
    const int output = part * kForwardOutputs + wn * 16 + lane % 4 * 4;
    if (output - lane % 4 * 4 >= outputs) continue;
    const uint32_t w2 = base + Layout::kW2 + part % 2 * Layout::kW2Bytes;
    float acc[kTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < Layout::kPadded / 16; ++k) {
      uint32_t b[4];
      load_right_pairs(b, w2, wn * 16, 2 * k, kRowBytes);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        uint32_t a[4];
        load_left(a, base + Layout::kGelu, (wm * kTiles + m) * 16, 2 * k, kRowBytes);
        multiply_add<T>(acc[m][0], a, b[0], b[1]);
        multiply_add<T>(acc[m][1], a, b[2], b[3]);
      }
    }
    if (output >= outputs) continue;
    const float4 prior = *reinterpret_cast<const float4*>(priors + output);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int m = i / 2, half = i % 2;
      const int64_t token = token0 + wm * 64 + (rank * kTiles + m) * 16 + lane / 4 + 8 * half;
      float a[4] = {acc[m][0][2 * half] + prior.x, acc[m][0][2 * half + 1] + prior.y,
                    acc[m][1][2 * half] + prior.z, acc[m][1][2 * half + 1] + prior.w};
      if (p.shape.cap > 0) {
#pragma unroll
        for (float& v : a) v = p.shape.cap * tanhf(v / p.shape.cap);
      }
      if (token >= p.shape.tokens) continue;
      T* to = static_cast<T*>(p.weights) + token * outputs + output;
      if (fours) {
        *reinterpret_cast<uint2*>(to) = {pack_word<T>(a), pack_word<T>(a + 2)};
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (output + j < outputs) to[j] = narrow<T>(a[j]);
        }
      }
    }
  }
}

// From the sums in every block's shared memory to the weights.
template <typename T, int NT, int CL>
__device__ __forceinline__ void finish_forward(const ConnectionWeightsForward& p,
                                               unsigned char* shared, int64_t token0, int rank) {
  using Layout = ForwardLayout<NT, CL>;
  const uint32_t base = shared_address(shared);
  if (!Layout::kW2Waits) {
    load_w2<T, NT>(p, base + Layout::kW2, 0);
    copy_commit();
  }
  cluster_sync<CL>();
  finish_hidden<T, NT, CL>(p, shared, token0, rank);
  // No block ends, or overwrites its sums, before the others have read them.
  if (Layout::kW2Waits) {
    cluster_sync<CL>();
    load_w2<T, NT>(p, base + Layout::kW2, 0);
    copy_commit();
  } else {
    cluster_arrive_relaxed<CL>();
  }
  forward_outputs<T, NT, CL>(p, base, reinterpret_cast<const float*>(shared + Layout::kPrior),
                             token0, rank);
  if (!Layout::kW2Waits) cluster_wait<CL>();
}

// Blocks a cluster, unless the caller has named them: as few as possible without leaving
// multiprocessors idle. A round of blocks takes 1 / CL of the time.
inline int forward_cluster(const ConnectionWeightsForward& p, const Device& device) {
  if (!device.bulk_copy) return 1;  // clusters came with bulk copies
  if (p.cluster != 0) return p.cluster;
  const int64_t tiles = (p.shape.tokens + kForwardTokens - 1) / kForwardTokens;
  const int64_t multiprocessors = device.multiprocessors;
  int best = 1;
  double best_time = 0;
  for (const int cluster : {1, 2, 4}) {
    const int64_t rounds = (tiles * cluster + multiprocessors - 1) / multiprocessors;
    const double time = static_cast<double>(rounds) / cluster + 0.05 * cluster;
    if (cluster == 1 || time < best_time) {
      best = cluster;
      best_time = time;
    }
  }
  return best;
}

}  // namespace muddformer::kernels
