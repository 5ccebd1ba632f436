// Parts of the backward of the aggregation with normed streams (aggregate_norm_backward.cuh): its
// parameters, n made again where it cannot be had by division, and the blocks' partial sums.
#pragma once

#include "aggregate_backward.cuh"
#include "norm.cuh"

namespace muddformer::kernels {

template <typename T, int C>
struct BackwardNormArgs : BackwardArgs<T, C> {
  const T* saved[C];           // Y_c of a normed way, mix of the post way; nullptr: no norm
  T* dv[C];                    // dV_c of a way with a norm; nullptr: not wanted
  const void* norm_weight[C];  // of the post way the post weight
  const void* norm_bias[C];
  int weight_slot[C];  // places among the partial sums of the block
  int bias_slot[C];
  const float* statistics;  // [2, C, N]
  float* partial;           // [blocks, slots, D]
  const T* base;
  int64_t base_stride;
  T* base_grad;
  int64_t tokens;
  int slots;
  bool shared_norms;  // weights and biases of the norms are kept in shared memory
  bool layer;
  bool wide;
  bool post;
};

// n of a vector of way c from the sources, where the norm's weight is too small to divide by.
template <typename T, int C>
__device__ __noinline__ uint4 remake_normed(const BackwardNormArgs<T, C>& args,
                                            const float* weights, int c, int64_t token, int column,
                                            float mean, float r) {
  float v[kVector<T>] = {};
  float x[kVector<T>];
  if (args.base != nullptr) {
    unpack<T>(load_once(args.base + token * args.base_stride + column), v);
  }
  for (int j = 0; j < args.sources; ++j) {
    unpack<T>(load_once(args.x[j] + token * args.x_stride[j] + column), x);
    for (int i = 0; i < kVector<T>; ++i) v[i] = fmaf(weights[j * kWaysPadded<C> + c], x[i], v[i]);
  }
  for (int i = 0; i < kVector<T>; ++i) v[i] = (v[i] - mean) * r;
  return pack<T>(v);
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

__device__ __forceinline__ float reciprocal(float value) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(value));
  return value;
}

}  // namespace muddformer::kernels
