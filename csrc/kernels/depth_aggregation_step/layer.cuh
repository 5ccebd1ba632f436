// The kernel of depth_aggregation_step.h.
//
// A cluster of 16 blocks (8 where a device has no room for more) has kTokens tokens. Its blocks
// share the rows of W1, so that all of them are read at once, and later the columns of the sources:
//
//   1. A block reads x and its rows of W1 and sums up h of its rows over the block, by tensor cores
//      where T has 2 bytes and there is no scale. Meanwhile its columns of the sources, its columns
//      of W2 and the norms' parameters come into shared memory.
//   2. It multiplies GELU(h) by its columns of W2, a part of every A, and sends each entry to the
//      block that owns it. The owners add up their parts, and send the sums to all blocks: bytes
//      are what such an exchange takes long for, and this way there are few.
//   3. Each block mixes its columns of the sources (by tensor cores, with A as the sum of two
//      numbers of type T).
//   4. For a norm the blocks send each other the sums of their columns.
//
// What is sent counts at a barrier of the block that it goes to (st.async): an exchange takes one
// way through the cluster. (Loads of W1 into registers are faster here than bulk copies.) The
// launch is programmatic: it may start before the kernel ahead of it is over and meanwhile asks for
// W1 to come into the L2 cache, which is harmless even if that kernel writes W1.
//
// A block passes through this code once with few warps, waiting for one instruction after the
// other: their number counts. Hence kOnce, for launches that need no loops; elsewhere loops are not
// unrolled unless it pays, and rare cases are out of the way.
//
// Entry n of A is that of way 4 * chunk + n % 4 and source n / 4 - chunk * padded, so that one load
// fetches the weights of a source; entries without a way or a source are 0.
#pragma once

#include <cstddef>

#include "../common/cluster.cuh"
#include "weights.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

template <typename T, int kTokens, bool kOnce>
class Step : StepWeights<T, kTokens, kOnce> {
  using Base = StepWeights<T, kTokens, kOnce>;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    this->start();
    T* const output = output_of(min(member(), p.ways - 1));
    if (p.hidden > 0) {
      this->hidden_sums();
    } else {
      this->stage();
      this->copy_prior();
    }
    __syncthreads();
    if (p.hidden > 0) this->send_parts();
    copy_wait_all();
    barrier_wait(&barriers.sources, 0);
    uint32_t x[kSteps][4];
    if constexpr (kPreloads) load_sources(x);
    if (p.hidden > 0) {
      this->send_a();
      wait_for_sent(&barriers.a);
    }
    mix(output, x);
    if (p.normed_ways != 0) norm(output);
  }

 private:
  using Base::barriers, Base::blocks, Base::chunks, Base::passes, Base::first_token,
      Base::kHasTensorCores, Base::lane, Base::p, Base::places, Base::rank, Base::streams,
      Base::thread, Base::token, Base::vectors, Base::warp, Base::warps;

  // The block's columns are dealt out in words of 4 bytes, 8 to a warp. Four threads have a word,
  // and each of them one of four ways; here is the word's place in the mixed streams.
  __device__ __forceinline__ float* mixed(int row, int pass) const {
    return this->template at<float>(places.y) +
           ((row * passes + pass) * p.threads + thread) * kWord<T>;
  }
  __device__ __forceinline__ int word_of_pass(int pass) const {
    return (pass * warps + warp) * 8 + (kHasTensorCores ? lane / 16 * 4 + lane % 4 : lane / 4);
  }
  __device__ __forceinline__ int member() const {
    return kHasTensorCores ? lane / 4 % 4 : lane % 4;
  }

  // Where this thread's word of the first pass goes, of the first token.
  __device__ __forceinline__ T* output_of(int way) const {
    return p.y[way] + token(0) * p.dim + rank * p.vectors * kVector<T> + word_of_pass(0) * kWord<T>;
  }
  __device__ __forceinline__ void write(T* output, int t, int pass, const float* values) const {
    if (kTokens > 1 && first_token + t >= p.tokens) return;
    T* to = output + t * static_cast<int64_t>(p.dim) + pass * warps * 8 * kWord<T>;
    *reinterpret_cast<uint32_t*>(to) = pack_word<T>(values);
  }

  __device__ __forceinline__ void mix(T* output, const uint32_t (*x)[4]) {
#pragma unroll 1
    for (int row = 0; row < kTokens * chunks; ++row) {
      const int t = chunks == 1 ? row : row / 2;
      const int way = 4 * (row - t * chunks) + member();
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        const int word = word_of_pass(pass);
        const bool inside = word < vectors * 4;
        float values[kWord<T>];
        if constexpr (kHasTensorCores) {
          multiply_sources(t, row, pass, x, values);
        } else {
          add_up_sources(t, row, inside ? word : 0, values);
        }
#pragma unroll
        for (int i = 0; p.normed_ways != 0 && i < kWord<T>; ++i) mixed(row, pass)[i] = values[i];
        if (inside && way < p.ways && (p.normed_ways >> way & 1) == 0) {
          write(way < 4 ? output : output_of(way), t, pass, values);
        }
      }
    }
  }

  // Whether the sources are in registers before A is there, and of how many times 16 sources.
  static constexpr bool kPreloads = kOnce && kTokens == 1;
  static constexpr int kSteps = kPreloads ? 4 : 1;

  // Where the lane's row is of the right operand that load_matrices_transposed fetches: the first
  // 16 sources of the warp's 16 columns.
  __device__ __forceinline__ uint32_t source_tile(int t, int pass) const {
    // Past the last column the last is read again, and without columns what is there: for nobody.
    const int vector = max(0, min(2 * (pass * warps + warp) + lane / 16, vectors - 1));
    return shared_address(this->template at<uint4>(places.sources) +
                          (t * p.padded + lane % 16) * p.stride + vector);
  }
  __device__ __forceinline__ void load_sources(uint32_t (*x)[4]) const {
    const uint32_t tile = source_tile(0, 0);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (16 * i < p.padded) load_matrices_transposed(x[i], tile + i * 16 * 16 * p.stride);
    }
  }

  // Times this, what is left of a small entry of A is not too small for float16.
  static constexpr float kLow = std::is_same_v<T, __half> ? 2048.0f : 1.0f;

  // Four ways of 16 columns by tensor cores. A is taken as two numbers of type T, which together
  // come close to float32: rows 0 to 3 of the left operand, and 4 to 7 for what those lack.
  __device__ __forceinline__ void multiply_sources(int t, int row, int pass, const uint32_t (*x)[4],
                                                   float (&values)[kWord<T>]) const {
    const float* a = this->template at<float>(places.a) + row * p.padded * 4 + member();
    float sums[2][4] = {};
    if constexpr (kPreloads) {
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        if (16 * i < p.padded) multiply_step(a + i * 16 * 4, x[i], sums);
      }
    } else {
      const uint32_t tile = source_tile(t, pass);
#pragma unroll 1
      for (int k = 0; k < p.padded; k += 16) {
        uint32_t right[4];
        load_matrices_transposed(right, tile + k * 16 * p.stride);
        multiply_step(a + k * 4, right, sums);
      }
    }
    const float scale = lane < 16 ? 1.0f : 1.0f / kLow;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float keep = lane < 16 ? sums[0][i] : sums[1][i];
      const float give = lane < 16 ? sums[1][i] : sums[0][i];
      const float other = __shfl_xor_sync(0xffffffffu, give * scale, 16);
      // Where the high part has gone to infinity, the low part would make it NaN. (A weight that is
      // 0 as a number of type T still does.)
      const float high = lane < 16 ? keep : other;
      values[i] = isfinite(high) ? keep * scale + other : high;
    }
  }
  __device__ __forceinline__ void multiply_step(const float* a, const uint32_t (&right)[4],
                                                float (&sums)[2][4]) const {
    uint32_t left[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = a + (8 * half + lane % 4 * 2) * 4;
      const float pair[2] = {from[0], from[4]};
      const uint32_t bits = pack_word<T>(pair);
      float high[2];
      unpack_word<T>(bits, high);
      const float low[2] = {(pair[0] - high[0]) * kLow, (pair[1] - high[1]) * kLow};
      left[2 * half] = lane < 16 ? bits : pack_word<T>(low);
    }
    multiply_add<T>(sums[0], left, right[0], right[1]);
    multiply_add<T>(sums[1], left, right[2], right[3]);
  }

  // In float32: each of a word's four threads adds up every fourth source for four ways.
  __device__ __forceinline__ void add_up_sources(int t, int row, int word,
                                                 float (&values)[kWord<T>]) const {
    const float4* a = this->template at<float4>(places.a) + row * p.padded;
    const uint32_t* x =
        this->template at<uint32_t>(places.sources) + t * p.padded * p.stride * 4 + word;
    float sums[4 * kWord<T>] = {};
#pragma unroll 4
    for (int j = member(); j < p.padded; j += 4) {
      const float4 w = a[j];
      float from[kWord<T>];
      unpack_word<T>(x[j * p.stride * 4], from);
#pragma unroll
      for (int i = 0; i < kWord<T>; ++i) {
        sums[i] = fmaf(w.x, from[i], sums[i]);
        sums[kWord<T> + i] = fmaf(w.y, from[i], sums[kWord<T> + i]);
        sums[2 * kWord<T> + i] = fmaf(w.z, from[i], sums[2 * kWord<T> + i]);
        sums[3 * kWord<T> + i] = fmaf(w.w, from[i], sums[3 * kWord<T> + i]);
      }
    }
    warp_sums<4 * kWord<T>, float, 2>(sums, lane);
#pragma unroll
    for (int i = 0; i < kWord<T>; ++i) values[i] = sums[i];
  }

  // Sum over a whole row, of Y or (round 1) of the squared deviations from its mean.
  __device__ __forceinline__ float total(int round, int stream) const {
    return sum_of_16(this->template at<float>(places.totals) + (round * streams + stream) * 16);
  }

  // Sums over the columns of each warp.
  __device__ __forceinline__ float* warp_sums_of(int round, int stream) const {
    return this->template at<float>(places.warp_sums) + (round * streams + stream) * kStepWarps;
  }

  // RMSNorm is LayerNorm with a mean of 0.
  __device__ __forceinline__ float mean_of(int stream) const {
    return p.layer_norm ? total(0, stream) * p.inverse_dim : 0.0f;
  }

  __device__ __forceinline__ void make_totals(int round) {
#pragma unroll 1
    for (int row = 0; row < kTokens * chunks; ++row) {
      const int stream = 4 * row + member();
      const float mean = round == 1 ? mean_of(stream) : 0.0f;
      float sum = 0.0f;
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        if (word_of_pass(pass) >= vectors * 4) break;
#pragma unroll
        for (int i = 0; i < kWord<T>; ++i) {
          const float value = mixed(row, pass)[i] - mean;
          sum += round == 1 ? value * value : value;
        }
      }
#pragma unroll
      for (const int distance : {kHasTensorCores ? 1 : 4, kHasTensorCores ? 2 : 8, 16}) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      const bool first = kHasTensorCores ? lane < 16 && lane % 4 == 0 : lane < 4;
      float* to = warp_sums_of(round, stream);
      if (first) to[warp] = sum;
    }
    __syncthreads();
    // A warp sends to one block at a time.
    for (int stream = lane; stream < streams; stream += 32) {
      const float sum = sum_of_16(warp_sums_of(round, stream));
      float* to = this->template at<float>(places.totals) + (round * streams + stream) * 16 + rank;
#pragma unroll 2
      for (int b = warp; b < blocks; b += warps) {
        send(in_block(to, b), in_block(&barriers.totals[round], b), sum);
      }
    }
    wait_for_sent(&barriers.totals[round]);
  }

  __device__ __forceinline__ void norm(T* output) {
    if (p.layer_norm) make_totals(0);
    make_totals(1);
    const int columns = p.vectors * kVector<T>;
    const void* norms = this->template at<unsigned char>(places.norms);
#pragma unroll 1
    for (int row = 0; row < kTokens * chunks; ++row) {
      const int t = chunks == 1 ? row : row / 2;
      const int way = 4 * (row - t * chunks) + member();
      if ((p.normed_ways >> way & 1) == 0) continue;
      const int stream = 4 * row + member();
      const float mean = mean_of(stream);
      const float factor = rsqrtf(total(1, stream) * p.inverse_dim + p.norm_eps);
#pragma unroll 1
      for (int pass = 0; pass < passes; ++pass) {
        const int word = word_of_pass(pass);
        if (word >= vectors * 4) break;
        float values[kWord<T>];
#pragma unroll
        for (int i = 0; i < kWord<T>; ++i) {
          const int place = way * columns + word * kWord<T> + i;
          values[i] = (mixed(row, pass)[i] - mean) * factor * parameter<T>(norms, p.wide, place);
          if ((p.biased_ways >> way & 1) != 0) {
            values[i] += parameter<T>(norms, p.wide, place + p.ways * columns);
          }
        }
        write(way < 4 ? output : output_of(way), t, pass, values);
      }
    }
  }
};

#endif  // __CUDA_ARCH__ >= 900

template <typename T, int kTokens, bool kOnce>
__global__ void __launch_bounds__(kStepThreads, 1)
    aggregation_step(const __grid_constant__ StepArgs<T> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ StepBarriers barriers;
  __shared__ uint32_t touched[kStepWarps];
  // A line of parameters takes long when it is first touched: all are asked for at once.
  const int used = offsetof(StepArgs<T>, source) + args.sources * int{sizeof(args.source[0])};
  for (int line = threadIdx.x / 32; line * 64 < used; line += args.threads / 32) {
    const uint32_t word = reinterpret_cast<const uint32_t*>(&args)[line * 16];
    uint32_t* to = touched + threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
      asm volatile("st.shared.u32 [%0], %1;" ::"r"(shared_address(to)), "r"(word));
    }
  }
  let_next_kernel_come();
  Step<T, kTokens, kOnce>(args, shared, barriers).run();
#endif
}

}  // namespace muddformer::kernels
