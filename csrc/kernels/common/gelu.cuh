// GELU and its derivative in float32.
#pragma once

#include "vector.cuh"

namespace muddformer::kernels {

inline constexpr float kSqrtTwoOverPi = 0.79788456080286536f;
inline constexpr float kGeluCubic = 0.044715f;

// The normal distribution's Phi(h), and exp(-h^2 / 2), which its slope wants too. The polynomial is
// Abramowitz and Stegun's 7.1.26, good to 1e-7: as good as 1 + erf(h / sqrt(2)) in float32, in half
// the instructions.
__device__ __forceinline__ float normal_cdf(float h, float& gauss) {
  float t = fmaf(0.23164189f, fabsf(h), 1.0f);  // 0.3275911 / sqrt(2)
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(gauss) : "f"(-0.72134752f * h * h));  // log2(e) / 2
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(t));
  const float tail =
      gauss * t *
      (0.127414796f +
       t * (-0.142248368f + t * (0.7107068705f + t * (-0.7265760135f + t * 0.5307027145f))));
  return h < 0 ? tail : 1.0f - tail;
}

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
    for (float& h : values) {
      float gauss;
      h *= normal_cdf(h, gauss);
    }
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
      float gauss;
      const float phi = normal_cdf(h, gauss);
      values[i] = h * phi;
      slopes[i] = phi + 0.5f * kSqrtTwoOverPi * h * gauss;
    }
  }
}

// prior and scale are float32 or of the dtype.
template <typename T>
__device__ __forceinline__ float load_mixed(const void* from, int64_t i, bool is_float32) {
  return is_float32 ? static_cast<const float*>(from)[i] : widen(static_cast<const T*>(from)[i]);
}

}  // namespace muddformer::kernels
