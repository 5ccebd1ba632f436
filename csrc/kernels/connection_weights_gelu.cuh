// GELU and its derivative in float32, and what the connection weights' kernels share beside.
#pragma once

#include "vector.cuh"

namespace muddformer::kernels {

inline constexpr int kWeightsThreads = 256;  // 8 warps

inline constexpr float kSqrtHalf = 0.70710678118654752f;
inline constexpr float kSqrtTwoOverPi = 0.79788456080286536f;
inline constexpr float kGeluCubic = 0.044715f;

// GELU of all values. The form is asked for once, outside of the loop: else every value would wait
// for the one before.
template <int count>
__device__ __forceinline__ void gelu(float (&values)[count], bool tanh_form) {
  if (tanh_form) {
#pragma unroll
    for (float& h : values) {
      h *= 0.5f + 0.5f * tanhf(kSqrtTwoOverPi * (h + kGeluCubic * h * h * h));
    }
  } else {
#pragma unroll
    for (float& h : values) h *= 0.5f + 0.5f * erff(h * kSqrtHalf);
  }
}

// The same with the derivatives.
template <int count>
__device__ __forceinline__ void gelu(float (&values)[count], float (&slopes)[count],
                                     bool tanh_form) {
  if (tanh_form) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float h = values[i];
      const float t = tanhf(kSqrtTwoOverPi * (h + kGeluCubic * h * h * h));
      const float inner = kSqrtTwoOverPi * (1.0f + 3.0f * kGeluCubic * h * h);
      const float half = 0.5f + 0.5f * t;
      values[i] = h * half;
      slopes[i] = half + 0.5f * h * (1.0f - t * t) * inner;
    }
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float h = values[i];
      const float half = 0.5f + 0.5f * erff(h * kSqrtHalf);
      values[i] = h * half;
      slopes[i] = half + 0.5f * kSqrtTwoOverPi * h * __expf(-0.5f * h * h);
    }
  }
}

// prior and scale are float32 or of the dtype.
template <typename T>
__device__ __forceinline__ float load_mixed(const void* from, int64_t i, bool is_float32) {
  return is_float32 ? static_cast<const float*>(from)[i] : widen(static_cast<const T*>(from)[i]);
}

}  // namespace muddformer::kernels
