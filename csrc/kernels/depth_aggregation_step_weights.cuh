// The first half of the kernel of depth_aggregation_step.cuh: from x to A.
#pragma once

#include "depth_aggregation_step_layout.cuh"
#include "exchange.cuh"
#include "vector.cuh"
#include "warp_sums.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

// Out of the way of what is usual.
__device__ __noinline__ float step_tanh(float x) {
  return tanhf(x);
}

// An entry of the prior, the scale or a norm's parameters.
template <typename T>
__device__ __forceinline__ float parameter(const void* from, bool wide, int i) {
  return wide ? static_cast<const float*>(from)[i] : widen(static_cast<const T*>(from)[i]);
}

// Sum over the warps, or over the first count of 16 values that lie together.
__device__ __forceinline__ float sum_of(const float* values, int count = kStepWarps) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kStepWarps; i += 4) {
    if (i >= count) break;
    const float4 four = *reinterpret_cast<const float4*>(values + i);
    sum += (four.x + four.y) + (four.z + four.w);
  }
  return sum;
}

// A block of the kernel.
template <typename T, int kTokens>
class StepWeights {
 public:
  __device__ __forceinline__ StepWeights(const StepArgs<T>& args, unsigned char* shared,
                                         StepBarriers& block_barriers)
      : p(args),
        rank(cluster_rank()),
        blocks(cluster_size()),
        first_token(static_cast<int>(blockIdx.x) / blocks * kTokens),
        entries(4 * args.chunks * args.padded),
        streams(4 * args.chunks * kTokens),
        vectors(max(0, min(args.vectors, args.dim / kVector<T> - rank * args.vectors))),
        first_row(min(rank * args.rows, args.hidden)),
        rows(min(args.rows, args.hidden - first_row)),
        memory(shared),
        places(step_shared(args, kTokens, blocks, blockDim.x)),
        barriers(block_barriers) {}

 protected:
  static constexpr int kRows = kTokens == 1 ? 16 : 8;  // of W1 that a thread has in flight

  template <typename V>
  __device__ __forceinline__ V* at(int place) const {
    return reinterpret_cast<V*>(memory + place);
  }
  __device__ __forceinline__ const T* row_of_w1(int r) const {
    return p.w1 + static_cast<int64_t>(first_row + r) * p.dim;
  }
  // The last cluster repeats the last token where it has none of its own.
  __device__ __forceinline__ int64_t token(int t) const {
    return min(first_token + t, p.tokens - 1);
  }
  // Whether entry n of A has a way and a source, and which.
  __device__ __forceinline__ bool place_of(int n, int& way, int& source) const {
    const int chunk = n >= 4 * p.padded ? 1 : 0;
    way = 4 * chunk + n % 4;
    source = n / 4 - chunk * p.padded;
    return way < p.ways && source < p.sources;
  }

  __device__ __forceinline__ void start() {
    const int i = threadIdx.x;
    if (i < 3) {
      uint64_t* barrier = i == 0 ? &barriers.parts : &barriers.totals[i - 1];
      barrier_init(barrier, 1);
      barrier_expect(barrier, blocks * 4 * (i == 0 ? kTokens * entries : streams));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
    // The fence has published the barriers: a release here would wait a microsecond for nothing.
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#pragma unroll 1
    for (int r = i; r < rows; r += blockDim.x) {
      asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row_of_w1(r)),
                   "r"(p.dim * int{sizeof(T)})
                   : "memory");
    }
  }

  // Asks for everything but x and W1, and clears what is padding.
  __device__ __forceinline__ void stage() {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int warps = blockDim.x / 32;
#pragma unroll 1
    for (int t = 0; t < kTokens; ++t) {
      uint4* to = at<uint4>(places.sources) + t * p.padded * p.vectors;
#pragma unroll 1
      for (int j = warp; j < p.padded; j += warps) {
        const bool valid = j < p.sources;
        const T* from =
            valid ? p.x[j] + token(t) * p.x_stride[j] + rank * p.vectors * kVector<T> : nullptr;
#pragma unroll 1
        for (int v = lane; v < vectors; v += 32) {
          if (valid) {
            copy_async<16>(to + j * p.vectors + v, from + v * kVector<T>);
          } else {
            to[j * p.vectors + v] = make_uint4(0, 0, 0, 0);
          }
        }
      }
    }
#pragma unroll 1
    for (int n = threadIdx.x; n < entries; n += blockDim.x) {
      int way, source;
      const bool valid = place_of(n, way, source);
      const int row = way * p.sources + source;
      const float prior = valid ? parameter<T>(p.prior, p.wide, row) : 0.0f;
#pragma unroll
      for (int t = 0; t < kTokens; ++t) at<float>(places.a)[t * entries + n] = prior;
      const T* from = p.w2 + static_cast<int64_t>(row) * p.hidden + first_row;
#pragma unroll 1
      for (int k = 0; valid && k < rows; k += 4) {
        copy_async<4 * int{sizeof(T)}>(at<T>(places.w2) + n * p.rows + k, from + k);
      }
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < kTokens * max(p.rows + 1, 4 * p.chunks) * kStepWarps;
         i += blockDim.x) {
      if (i % kStepWarps >= warps) at<float>(places.sums)[i] = 0.0f;
    }
    if (!p.normed) return;
    const int bytes = kVector<T> * (p.wide ? 4 : int{sizeof(T)});  // for a vector
#pragma unroll 1
    for (int row = warp; row < 2 * p.ways; row += warps) {
      const void* from = row < p.ways ? p.norm_weight[row] : p.norm_bias[row - p.ways];
      if (from == nullptr) continue;
      unsigned char* to = at<unsigned char>(places.norms) + row * p.vectors * bytes;
#pragma unroll 1
      for (int i = lane * 16; i < vectors * bytes; i += 32 * 16) {
        copy_async<16>(to + i,
                       static_cast<const unsigned char*>(from) + rank * p.vectors * bytes + i);
      }
    }
  }

  // Sums over the columns of each warp of x W1^T and of x^2.
  __device__ __forceinline__ void hidden_sums() {
    const int lane = threadIdx.x % 32;
    const int row_vectors = p.dim / kVector<T>;
    float* to = at<float>(places.sums) + threadIdx.x / 32;
#pragma unroll 1
    for (int first = 0; first < p.rows; first += kRows) {
      float sums[kTokens][kRows] = {};
      float squares[kTokens] = {};
#pragma unroll 1
      for (int v = threadIdx.x; v - static_cast<int>(threadIdx.x) < row_vectors; v += blockDim.x) {
        uint4 x[kTokens];
        uint4 w[kRows];
        const bool inside = v < row_vectors;
        const int column = inside ? v * kVector<T> : 0;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          x[t] = load_vector(p.x[p.sources - 1] + token(t) * p.x_stride[p.sources - 1] + column);
        }
        const T* from = row_of_w1(first) + column;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (first + r < rows) w[r] = load_vector(from + static_cast<int64_t>(r) * p.dim);
        }
        if (first == 0 && v == static_cast<int>(threadIdx.x)) stage();
        float values[kTokens][kVector<T>];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          unpack<T>(x[t], values[t]);
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) {
            if (!inside) values[t][i] = 0.0f;
            squares[t] = fmaf(values[t][i], values[t][i], squares[t]);
          }
          if (__builtin_expect(p.scale != nullptr, 0)) {
#pragma unroll
            for (int i = 0; i < kVector<T>; ++i) {
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
        float* to_token = to + t * (p.rows + 1) * kStepWarps;
        const int r = first + warp_sums<kRows>(sums[t], lane);
        if (lane % kSharers<kRows> == 0 && r < p.rows) to_token[r * kStepWarps] = sums[t][0];
        if (first == 0) {
          warp_sums<1>(&squares[t], lane);
          if (lane == 0) to_token[p.rows * kStepWarps] = squares[t];
        }
      }
    }
  }

  __device__ __forceinline__ void gelu() {
#pragma unroll 1
    for (int r = threadIdx.x; r < rows; r += blockDim.x) {
#pragma unroll 1
      for (int t = 0; t < kTokens; ++t) {
        const float* sums = at<float>(places.sums) + t * (p.rows + 1) * kStepWarps;
        const float squares = sum_of(sums + p.rows * kStepWarps);
        const float h = sum_of(sums + r * kStepWarps) * rsqrtf(squares * p.inverse_dim + p.eps);
        const float phi = __builtin_expect(p.gelu_tanh, 0)
                              ? step_tanh(0.7978845608028654f * (h + 0.044715f * h * h * h))
                              : erff(h * 0.7071067811865476f);
        at<float>(places.gelu)[t * p.rows + r] = 0.5f * h * (1.0f + phi);
      }
    }
  }

  // Multiplies by the block's columns of W2.
  __device__ __forceinline__ void make_part() {
    constexpr int kWords = 4 / kWord<T>;
#pragma unroll 1
    for (int n = threadIdx.x; n < entries; n += blockDim.x) {
      int way, source;
      float sums[kTokens] = {};
      if (place_of(n, way, source)) {
        const T* row = at<T>(places.w2) + n * p.rows;
#pragma unroll 1
        for (int k = 0; k < rows; k += 4) {
          float w[4];
          if constexpr (kWords == 4) {
            unpack<T>(*reinterpret_cast<const uint4*>(row + k), w);
          } else {
            const uint2 bits = *reinterpret_cast<const uint2*>(row + k);
            unpack_word<T>(bits.x, w);
            unpack_word<T>(bits.y, w + 2);
          }
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            const float4 g =
                *reinterpret_cast<const float4*>(at<float>(places.gelu) + t * p.rows + k);
            sums[t] = fmaf(w[0], g.x, fmaf(w[1], g.y, fmaf(w[2], g.z, fmaf(w[3], g.w, sums[t]))));
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) at<float>(places.part)[t * entries + n] = sums[t];
    }
  }

  __device__ __forceinline__ void send_part() {
    const int quads = kTokens * entries / 4;
    const float4* part = at<float4>(places.part);
#pragma unroll 1
    for (int b = threadIdx.x / 32; b < blocks; b += blockDim.x / 32) {
      const uint32_t to = in_block(at<float4>(places.parts) + rank * quads, b);
      const uint32_t barrier = in_block(&barriers.parts, b);
#pragma unroll 1
      for (int i = threadIdx.x % 32; i < quads; i += 32) send(to + i * 16, barrier, part[i]);
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

  // A, from the prior that is there.
  __device__ __forceinline__ void make_a() {
    const int stride = kTokens * entries;
    float* a = at<float>(places.a);
#pragma unroll 1
    for (int i = threadIdx.x; i < stride; i += blockDim.x) {
      float sum = a[i];
      if (p.hidden > 0) {
        const float* parts = at<float>(places.parts) + i;
        sum += blocks == 16 ? strided_sum<16>(parts, stride) : strided_sum<8>(parts, stride);
      }
      a[i] = __builtin_expect(p.cap > 0.0f, 0) ? p.cap * step_tanh(sum / p.cap) : sum;
    }
  }

  const StepArgs<T>& p;
  const int rank, blocks, first_token;
  const int entries;          // of a token's A
  const int streams;          // of all tokens
  const int vectors;          // of this block
  const int first_row, rows;  // of W1 in this block
  unsigned char* const memory;
  const StepShared places;
  StepBarriers& barriers;
};

#endif  // __CUDA_ARCH__ >= 900

}  // namespace muddformer::kernels
