// Parts of the backward of the aggregation with normed streams (backward.cuh): its
// parameters, n made again where it cannot be had by division, the blocks' partial sums, and the
// gradient of the newest source.
#pragma once

#include "../common/norm.cuh"
#include "../depth_aggregate/backward.cuh"

namespace muddformer::kernels {

template <typename T, int C>
struct BackwardNormArgs : BackwardArgs<T, C> {
  const T* saved[C];           // Y_c of a normed way, mix of the post way; nullptr: no norm
  T* dv[C];                    // dV_c of a way with a norm; nullptr: not wanted
  const void* norm_weight[C];  // of the post way the post weight
  const void* norm_bias[C];
  int weight_slot[C];  // places among the partial sums of the block
  int bias_slot[C];
  const float* statistics;  // [2, C, N], with a pre weight [2, C + 1, N]
  float* partial;           // [blocks, slots, D]
  const void* pre_weight;
  int64_t tokens;
  int pre_slot;
  int slots;
  bool add_newest;
  bool shared_norms;  // weights and biases of the norms are kept in shared memory
  bool layer;
  bool wide;
  bool post;
};

// n of a word of way c from the sources, where the norm's weight is too small to divide by. Rare,
// and a call would cost all others registers: hence a loop of few instructions.
template <typename T, int C, bool kNewest>
__device__ __forceinline__ void remake_normed(const BackwardNormArgs<T, C>& args,
                                              const float* weights, int c, int64_t token,
                                              int column, float mean, float r, float newest_r,
                                              float* n) {
  constexpr int W = kWord<T>;
  float v[W] = {};
#pragma unroll 1
  for (int j = 0; j < args.sources; ++j) {
    const T* from = args.x[j] + token * args.x_stride[j] + column;
    float x[W];
    unpack_word<T>(__ldg(reinterpret_cast<const uint32_t*>(from)), x);
    if (kNewest && j == args.sources - 1) {
#pragma unroll
      for (int i = 0; args.add_newest && i < W; ++i) v[i] += x[i];
      if (args.pre_weight != nullptr) {
        float weight[W];
#pragma unroll
        for (int i = 0; i < W; ++i) {
          weight[i] = norm_entry<T>(args.pre_weight, args.wide, column + i);
        }
        unpack_word<T>(rms_normed_word<T>(x, newest_r, weight), x);
      }
    }
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] = fmaf(weights[j * kWaysPadded<C> + c], x[i], v[i]);
  }
#pragma unroll
  for (int i = 0; i < W; ++i) n[i] = (v[i] - mean) * r;
}

// Whether dividing Y - bias by the weight would lose what the rounding of Y has left of n.
__device__ __forceinline__ bool too_small(float weight, float bias) {
  return !(fabsf(weight) >= 0x1p-8f && 2.0f * fabsf(weight) >= fabsf(bias));
}

// The ways whose n must be made again at a vector of columns, one bit each.
template <typename T, int C>
__device__ __forceinline__ unsigned ways_to_remake(const BackwardNormArgs<T, C>& args, int column) {
  unsigned ways = 0;
  for (int c = 0; c < C; ++c) {
    if (args.saved[c] == nullptr || (args.post && c == C - 1)) continue;
    float weight[kVector<T>];
    float bias[kVector<T>] = {};
    load_norm<T>(args.norm_weight[c], args.wide, column, weight);
    if (args.norm_bias[c] != nullptr) load_norm<T>(args.norm_bias[c], args.wide, column, bias);
    for (int i = 0; i < kVector<T>; ++i) {
      if (too_small(weight[i], bias[i])) ways |= 1u << c;
    }
  }
  return ways;
}

// Place of a column among the partial sums of a slot: the first four entries of all vectors, then
// the others, so that neighbouring threads meet different banks.
template <typename T>
__device__ __forceinline__ int partial_place(int column, int dim) {
  const int in_vector = column % kVector<T>;
  return in_vector / 4 * (dim / kVector<T> * 4) + column / kVector<T> * 4 + in_vector % 4;
}

// A vector of floats that lies in this way.
template <typename T>
__device__ __forceinline__ void get_floats(const float* from, int column, int dim,
                                           float (&to)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + partial_place<T>(column + i, dim));
    to[i] = four.x;
    to[i + 1] = four.y;
    to[i + 2] = four.z;
    to[i + 3] = four.w;
  }
}

template <typename T>
__device__ __forceinline__ void put_floats(float* to, int column, int dim,
                                           const float (&from)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    *reinterpret_cast<float4*>(to + partial_place<T>(column + i, dim)) =
        make_float4(from[i], from[i + 1], from[i + 2], from[i + 3]);
  }
}

// Adds a vector to this thread's place among the partial sums of a slot, which it alone uses.
template <typename T>
__device__ __forceinline__ void add_partial(float* slot, int column, int dim,
                                            const float (&values)[kVector<T>]) {
#pragma unroll
  for (int i = 0; i < kVector<T>; i += 4) {
    float4& sum = *reinterpret_cast<float4*>(slot + partial_place<T>(column + i, dim));
    float4 four = sum;
    four.x += values[i];
    four.y += values[i + 1];
    four.z += values[i + 2];
    four.w += values[i + 3];
    sum = four;
  }
}

// A vector of the gradient of the last source, but for its part along n, and what this thread adds
// to the dot products, to <g, n> and, in place of the pre weight, to its gradient. Without a pre
// weight r and all of `weight` are 1. post_dy: dY of the post way, whose base it passes by dV.
template <typename T, int C>
__device__ __forceinline__ void chain_newest(const uint4& x_bits, const uint4& grad_bits,
                                             const uint4 (&dv_bits)[C], const uint4& post_dy,
                                             const float* weights, float r, bool add_newest,
                                             bool post, float (&weight)[kVector<T>], float* dots,
                                             float& along, float (&result)[kVector<T>]) {
  float w[C];
  read_ways<C>(weights, w);
#pragma unroll
  for (int c = 0; c < C; ++c) dots[c] = 0.0f;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    constexpr int W = kWord<T>;
    float n[W];
    float mixed[W];
    float sum[W];
    float base[W] = {};
    unpack_word<T>(word_of(x_bits, word), n);
    unpack_word<T>(word_of(grad_bits, word), sum);
    unpack_word<T>(rms_normed_word<T>(n, r, weight + word * W), mixed);
#pragma unroll
    for (int c = 0; c < C; ++c) {
      float dv[W];
      unpack_word<T>(word_of(dv_bits[c], word), dv);
#pragma unroll
      for (int i = 0; i < W; ++i) {
        dots[c] = fmaf(dv[i], mixed[i], dots[c]);
        sum[i] = fmaf(w[c], dv[i], sum[i]);
      }
      if (post && c == C - 1) unpack_word<T>(word_of(post_dy, word), dv);
#pragma unroll
      for (int i = 0; i < W; ++i) base[i] += dv[i];
    }
#pragma unroll
    for (int i = 0; i < W; ++i) {
      const float g = sum[i] * weight[word * W + i];
      n[i] *= r;
      along = fmaf(g, n[i], along);
      weight[word * W + i] = sum[i] * n[i];
      result[word * W + i] = fmaf(r, g, add_newest ? base[i] : 0.0f);
    }
  }
}

// Takes its part along x off a gradient: what the backward of RMSNorm does at the end.
template <typename T>
__device__ __forceinline__ void subtract_along(const uint4& x_bits, float factor,
                                               float (&grad)[kVector<T>]) {
  float x[kVector<T>];
  unpack<T>(x_bits, x);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) grad[i] = fmaf(-factor, x[i], grad[i]);
}

// Entry c of values that are in registers.
template <int C>
__device__ __forceinline__ float entry_of(const float (&values)[C], int c) {
  float value = values[0];
#pragma unroll
  for (int i = 1; i < C; ++i) value = i == c ? values[i] : value;
  return value;
}

template <int C>
__device__ __forceinline__ void add_to(float (&values)[C], int c, float value) {
#pragma unroll
  for (int i = 0; i < C; ++i) values[i] += i == c ? value : 0.0f;
}

__device__ __forceinline__ float reciprocal(float value) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
}

}  // namespace muddformer::kernels
