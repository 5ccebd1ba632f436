// The first half of the kernel of layer.cuh: from x to A.
#pragma once

#include "../common/gelu.cuh"
#include "../common/tensor_core.cuh"
#include "../common/warp_sums.cuh"
#include "block.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

template <typename T, int kTokens, bool kOnce>
class StepWeights : protected StepBlock<T, kTokens, kOnce> {
  using Base = StepBlock<T, kTokens, kOnce>;

 public:
  using Base::Base;

 protected:
  using Base::barriers, Base::blocks, Base::capped, Base::entries, Base::first_owned,
      Base::first_token, Base::kHasTensorCores, Base::lane, Base::newest, Base::newest_stride,
      Base::owned, Base::owned_prior, Base::p, Base::places, Base::prior_bits, Base::rank,
      Base::row_of_w1, Base::rows, Base::thread, Base::token, Base::warp, Base::warps;

  // Sums over the columns of each warp of x W1^T and of x^2.
  __device__ __forceinline__ void hidden_sums() {
    if constexpr (kHasTensorCores) {
      if (kOnce || p.scale == nullptr) return multiply_rows();
    }
    add_up_rows();
  }

  __device__ __forceinline__ void load_x(int vector, bool inside, uint4 (&x)[kTokens]) const {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const T* from = newest + (token(t) - first_token) * newest_stride + vector * kVector<T>;
      x[t] = inside ? load_vector(from) : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void store_squares(float (&squares)[kTokens]) const {
    float* to = this->template at<float>(places.sums) + p.rows * kStepWarps + warp;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      warp_sums<1>(&squares[t], lane);
      if (lane == 0) to[t * (p.rows + 1) * kStepWarps] = squares[t];
    }
  }

  // By tensor cores, 16 rows by 8 tokens at a time. A lane's 16 bytes of a row are 8 neighbours,
  // which the product takes for others; x is taken in the same order.
  __device__ __forceinline__ void multiply_rows() {
    constexpr int kGroups = 8;  // of 4 vectors
    constexpr int kChains = 4;  // of products that wait for each other
    const int row_vectors = p.dim / kVector<T>;
    const int row = lane / 4, member = lane % 4;
    uint4* own = this->template at<uint4>(places.x) + warp * kTokens * 32;
    float* to = this->template at<float>(places.sums) + warp;
#pragma unroll 1
    for (int first = 0; first < p.rows; first += 16) {
      float sums[kChains][4] = {};
      float squares[kTokens] = {};
#pragma unroll 1
      for (int base = 0; base < row_vectors; base += p.threads) {
        const int start = base + warp * 32;
        uint4 x[kTokens], w[kGroups][2];
        load_x(start + lane, start + lane < row_vectors, x);
        // Rows past the last spoil only themselves.
        const auto load_if = [](bool wanted, const T* address, uint4& bits) {
          if (!kOnce) bits = make_uint4(0, 0, 0, 0);
          if (wanted) bits = load_vector(address);
        };
        const T* from = row_of_w1(first + row) + (start + member) * kVector<T>;
        const T* below = from + static_cast<int64_t>(8) * p.dim;
        const int left = row_vectors - start - member;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const int column = i * 4 * kVector<T>;
          const bool inside = kOnce ? start < row_vectors : 4 * i < left;
          load_if(inside && first + row < rows, from + column, w[i][0]);
          load_if(inside && first + row + 8 < rows, below + column, w[i][1]);
        }
        if (kOnce || (first == 0 && base == 0)) this->stage();
        __syncwarp();
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          own[t * 32 + lane] = x[t];
          float values[kVector<T>];
          unpack<T>(x[t], values);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            squares[t] = fmaf(values[i], values[i], squares[t]);
          }
        }
        __syncwarp();
        if (first == 0 && (kOnce || base + p.threads >= row_vectors)) {
          store_squares(squares);
        }
        if (kOnce && start >= row_vectors) break;
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const uint4 right = own[row % kTokens * 32 + 4 * i + member];
          const auto& [above, under] = w[i];
          multiply_add<T>(sums[2 * i % kChains], {above.x, under.x, above.y, under.y}, right.x,
                          right.y);
          multiply_add<T>(sums[(2 * i + 1) % kChains], {above.z, under.z, above.w, under.w},
                          right.z, right.w);
        }
        if (kOnce) break;
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (member != t / 2) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = first + row + 8 * half;
          if (r >= p.rows) continue;
          const int place = 2 * half + t % 2;
          to[(t * (p.rows + 1) + r) * kStepWarps] =
              (sums[0][place] + sums[1][place]) + (sums[2][place] + sums[3][place]);
        }
      }
      if (kOnce) break;
    }
  }

  // In float32.
  __device__ __forceinline__ void add_up_rows() {
    constexpr int kRows = kTokens == 1 ? 16 : 8;  // that a thread has in flight
    const int row_vectors = p.dim / kVector<T>;
    float* to = this->template at<float>(places.sums) + warp;
#pragma unroll 1
    for (int first = 0; first < p.rows; first += kRows) {
      float sums[kTokens][kRows] = {};
      float squares[kTokens] = {};
#pragma unroll 1
      for (int base = 0; base < row_vectors; base += p.threads) {
        const int v = base + thread;
        const bool inside = v < row_vectors;
        const int column = inside ? v * kVector<T> : 0;
        uint4 x[kTokens], w[kRows];
        load_x(v, inside, x);
        const T* from = row_of_w1(first) + column;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first + r < rows) w[r] = load_vector(from + static_cast<int64_t>(r) * p.dim);
        }
        if (first == 0 && base == 0) this->stage();
        float values[kTokens][kVector<T>];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          unpack<T>(x[t], values[t]);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            squares[t] = fmaf(values[t][i], values[t][i], squares[t]);
            if (__builtin_expect(p.scale != nullptr, 0)) {
              values[t][i] *= parameter<T>(p.scale, p.wide, column + i);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first + r >= rows) break;
          float row[kVector<T>];
          unpack<T>(w[r], row);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) {
              sums[t][r] = fmaf(values[t][i], row[i], sums[t][r]);
            }
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int r = first + warp_sums<kRows>(sums[t], lane);
        if (lane % kSharers<kRows> == 0 && r < p.rows) {
          to[(t * (p.rows + 1) + r) * kStepWarps] = sums[t][0];
        }
      }
      if (first == 0) store_squares(squares);
    }
  }

  // GELU of the block's rows, for this warp alone.
  __device__ __forceinline__ float* gelu() const {
    float* to = this->template at<float>(places.gelu) + warp * kTokens * p.rows;
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      const float* sums = this->template at<float>(places.sums) + t * (p.rows + 1) * kStepWarps;
      const float squares = sum_of_16(sums + p.rows * kStepWarps);
#pragma unroll 1
      for (int r = lane; r < rows; r += 32) {
        const float h = sum_of_16(sums + r * kStepWarps) * rsqrtf(squares * p.inverse_dim + p.eps);
        float gauss;
        const float phi =
            __builtin_expect(p.gelu_tanh, 0)
                ? 0.5f + 0.5f * step_tanh(kSqrtTwoOverPi * (h + kGeluCubic * h * h * h))
                : normal_cdf(h, gauss);
        to[t * p.rows + r] = h * phi;
        if (kOnce) break;
      }
    }
    __syncwarp();
    return to;
  }

  static __device__ __forceinline__ void unpack_four(const T* from, float (&values)[4]) {
    if constexpr (sizeof(T) == 4) {
      unpack<T>(*reinterpret_cast<const uint4*>(from), values);
    } else {
      const uint2 bits = *reinterpret_cast<const uint2*>(from);
      unpack_word<T>(bits.x, values);
      unpack_word<T>(bits.y, values + 2);
    }
  }

  // Multiplies by the block's columns of W2 and sends every entry to the block that adds it up.
  __device__ __forceinline__ void send_parts() const {
    if (warp * 32 >= entries) return;
    const float* g = gelu();
    copy_wait_all();  // of W2, what this thread asked for itself
    float* const slots = this->template at<float>(places.parts) + (rank << p.owned_log2);
#pragma unroll 1
    for (int n = thread; n < entries; n += p.threads) {
      int way, source;
      float sums[kTokens] = {};
      if (this->place_of(n, way, source)) {
        const T* row = this->template at<T>(places.w2) + n * p.rows;
#pragma unroll(kOnce ? 4 : 1)
        for (int k = 0; k < (kOnce ? 16 : rows); k += 4) {
          if (kOnce && k >= rows) break;
          float w[4];
          unpack_four(row + k, w);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            const float4 four = *reinterpret_cast<const float4*>(g + t * p.rows + k);
            sums[t] += fmaf(w[0], four.x, w[1] * four.y) + fmaf(w[2], four.z, w[3] * four.w);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int entry = t * entries + n;
        const int owner = entry >> p.owned_log2;
        float* slot = slots + (entry - (owner << p.owned_log2));
        const uint32_t to = in_block(slot, owner);
        const uint32_t barrier = in_block(&barriers.parts, owner);
        // Half a warp at a time: lanes that send to different blocks take three times as long.
        if (lane < 16) send(to, barrier, sums[t]);
        if (lane >= 16) send(to, barrier, sums[t]);
      }
      if (kOnce) break;
    }
  }

  // Adds up the block's entries of A and sends them to all blocks, a warp to every so many.
  __device__ __forceinline__ void send_a() const {
    if (owned <= 0 || warp >= blocks) return;
    const int stride = 1 << p.owned_log2;
    wait_for_sent(&barriers.parts);
#pragma unroll 1
    for (int i = lane; i < owned; i += 32) {
      const float* parts = this->template at<float>(places.parts) + i;
      const float prior =
          parameter_of<T>(i < 32 ? owned_prior : prior_bits(first_owned + i), p.wide);
      const float sum =
          blocks == 16 ? strided_sum<16>(parts, stride) : strided_sum<8>(parts, stride);
      const float a = capped(prior + sum);
#pragma unroll 2
      for (int b = warp; b < blocks; b += warps) {
        send(in_block(this->template at<float>(places.a) + first_owned + i, b),
             in_block(&barriers.a, b), a);
      }
    }
  }

  // Sum of kCount values that are stride apart.
  template <int kCount>
  __device__ __forceinline__ float strided_sum(const float* values, int stride) const {
    float sums[4] = {};
#pragma unroll
    for (int b = 0; b < kCount; ++b) sums[b % 4] += values[b * stride];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // A where there is no generator.
  __device__ __forceinline__ void copy_prior() const {
#pragma unroll 1
    for (int i = thread; i < kTokens * entries; i += p.threads) {
      this->template at<float>(places.a)[i] = capped(parameter_of<T>(prior_bits(i), p.wide));
    }
  }
};

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
