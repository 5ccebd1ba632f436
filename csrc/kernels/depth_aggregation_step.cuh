// The kernel of depth_aggregation_step.h.
//
// A cluster of 16 or 8 blocks has kTokens tokens. Its blocks share the rows of W1, so that all of
// them are read at once, and later the columns of the sources:
//
//   1. A block reads x and its rows of W1, a thread having a vector of 16 bytes of each, and sums
//      up h of its rows over the block. Meanwhile its columns of the sources, its columns of W2 and
//      the norms' parameters come into shared memory.
//   2. It multiplies GELU(h) by its columns of W2: a part of every A, sent to all blocks.
//   3. Each block adds the parts up to A and mixes its columns of the sources.
//   4. For a norm the blocks send each other the sums of their columns.
//
// What is sent counts at a barrier of the block that it goes to (st.async): an exchange takes one
// way through the cluster. (Loads of W1 into registers are faster here than bulk copies.) The
// launch is programmatic: it may start before the kernel ahead of it is over and meanwhile asks for
// W1 to come into the L2 cache, which is harmless even if that kernel writes W1.
//
// A block passes through this code once with few warps, so the length of the code counts: loops are
// not unrolled unless it pays, and rare cases are out of the way.
//
// Entry n of A is that of way 4 * chunk + n % 4 and source n / 4 - chunk * padded, so that one load
// fetches the weights of a source; entries without a way or a source are 0.
#pragma once

#include "depth_aggregation_step_weights.cuh"

namespace muddformer::kernels {

#if __CUDA_ARCH__ >= 900

template <typename T, int kTokens>
class Step : StepWeights<T, kTokens> {
  using Base = StepWeights<T, kTokens>;

 public:
  using Base::Base;

  __device__ __forceinline__ void run() {
    this->start();
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (p.hidden > 0) {
      this->hidden_sums();
      __syncthreads();
      this->gelu();
    } else {
      this->stage();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
    if (p.hidden > 0) {
      this->make_part();
      __syncthreads();
    }
    // From here on all blocks have started and their barriers are ready.
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (p.hidden > 0) {
      this->send_part();
      wait_for_sent(&barriers.parts);
    }
    this->make_a();
    __syncthreads();
    mix();
    if (p.normed) norm();
  }

 private:
  using Base::barriers, Base::blocks, Base::first_token, Base::p, Base::places, Base::rank,
      Base::streams, Base::token, Base::vectors;

  // The block's columns are dealt out in words of 4 bytes. Four threads have a word, and each of
  // them one of four ways; here is the word's place in the mixed streams.
  __device__ __forceinline__ float* mixed(int row, int pass) const {
    return this->template at<float>(places.y) +
           ((row * p.passes + pass) * static_cast<int>(blockDim.x) + threadIdx.x) * kWord<T>;
  }
  __device__ __forceinline__ int word_of_pass(int pass) const {
    return (pass * static_cast<int>(blockDim.x) + threadIdx.x) / 4;
  }

  __device__ __forceinline__ void write(int t, int way, int word, const float* values) const {
    if (first_token + t >= p.tokens) return;
    T* to = p.y[way] + token(t) * p.dim + rank * p.vectors * kVector<T> + word * kWord<T>;
    *reinterpret_cast<uint32_t*>(to) = pack_word<T>(values);
  }

  // Each of a word's four threads adds up every fourth source for four ways.
  __device__ __forceinline__ void mix() {
    const int member = threadIdx.x % 4;
#pragma unroll 1
    for (int row = 0; row < kTokens * p.chunks; ++row) {
      const int t = p.chunks == 1 ? row : row / 2;
      const int way = 4 * (row - t * p.chunks) + member;
      const float4* a = this->template at<float4>(places.a) + row * p.padded;
#pragma unroll 1
      for (int pass = 0; pass < p.passes; ++pass) {
        const int word = word_of_pass(pass);
        const bool inside = word < vectors * 4;
        const int stride = p.vectors * 4;
        const uint32_t* x = this->template at<uint32_t>(places.sources) +
                            (t * p.padded + member) * stride + (inside ? word : 0);
        float sums[4 * kWord<T>] = {};
#pragma unroll 3
        for (int j = member; j < p.padded; j += 4) {
          const float4 w = a[j];
          float values[kWord<T>];
          unpack_word<T>(*x, values);
          x += 4 * stride;
#pragma unroll
          for (int i = 0; i < kWord<T>; ++i) {
            sums[i] = fmaf(w.x, values[i], sums[i]);
            sums[kWord<T> + i] = fmaf(w.y, values[i], sums[kWord<T> + i]);
            sums[2 * kWord<T> + i] = fmaf(w.z, values[i], sums[2 * kWord<T> + i]);
            sums[3 * kWord<T> + i] = fmaf(w.w, values[i], sums[3 * kWord<T> + i]);
          }
        }
        warp_sums<4 * kWord<T>, float, 2>(sums, threadIdx.x);
#pragma unroll
        for (int i = 0; p.normed && i < kWord<T>; ++i) mixed(row, pass)[i] = sums[i];
        if (inside && way < p.ways && p.norm_weight[way] == nullptr) write(t, way, word, sums);
      }
    }
  }

  // Sum over a whole row, of Y or (round 1) of the squared deviations from its mean.
  __device__ __forceinline__ float total(int round, int stream) const {
    return sum_of(this->template at<float>(places.totals) + (round * streams + stream) * blocks,
                  blocks);
  }

  // RMSNorm is LayerNorm with a mean of 0.
  __device__ __forceinline__ float mean_of(int stream) const {
    return p.layer_norm ? total(0, stream) * p.inverse_dim : 0.0f;
  }

  __device__ __forceinline__ void make_totals(int round) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = 0; row < kTokens * p.chunks; ++row) {
      const int stream = 4 * row + lane % 4;
      const float mean = round == 1 ? mean_of(stream) : 0.0f;
      float sum = 0.0f;
#pragma unroll 1
      for (int pass = 0; pass < p.passes; ++pass) {
        if (word_of_pass(pass) >= vectors * 4) break;
#pragma unroll
        for (int i = 0; i < kWord<T>; ++i) {
          const float value = mixed(row, pass)[i] - mean;
          sum += round == 1 ? value * value : value;
        }
      }
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, distance);
      }
      if (lane < 4)
        this->template at<float>(places.sums)[stream * kStepWarps + threadIdx.x / 32] = sum;
    }
    __syncthreads();
    const int shift = 31 - __clz(blocks);
    for (int i = threadIdx.x; i < streams << shift; i += blockDim.x) {
      const int stream = i >> shift;
      const int b = i & (blocks - 1);
      float* to =
          this->template at<float>(places.totals) + (round * streams + stream) * blocks + rank;
      send(in_block(to, b), in_block(&barriers.totals[round], b),
           sum_of(this->template at<float>(places.sums) + stream * kStepWarps));
    }
    wait_for_sent(&barriers.totals[round]);
  }

  __device__ __forceinline__ void norm() {
    if (p.layer_norm) make_totals(0);
    make_totals(1);
    const int columns = p.vectors * kVector<T>;
    const void* norms = this->template at<unsigned char>(places.norms);
#pragma unroll 1
    for (int row = 0; row < kTokens * p.chunks; ++row) {
      const int t = p.chunks == 1 ? row : row / 2;
      const int way = 4 * (row - t * p.chunks) + threadIdx.x % 4;
      if (way >= p.ways || p.norm_weight[way] == nullptr) continue;
      const int stream = 4 * row + threadIdx.x % 4;
      const float mean = mean_of(stream);
      const float factor = rsqrtf(total(1, stream) * p.inverse_dim + p.norm_eps);
#pragma unroll 1
      for (int pass = 0; pass < p.passes; ++pass) {
        const int word = word_of_pass(pass);
        if (word >= vectors * 4) break;
        float values[kWord<T>];
#pragma unroll
        for (int i = 0; i < kWord<T>; ++i) {
          const int place = way * columns + word * kWord<T> + i;
          values[i] = (mixed(row, pass)[i] - mean) * factor * parameter<T>(norms, p.wide, place);
          if (p.norm_bias[way] != nullptr) {
            values[i] += parameter<T>(norms, p.wide, place + p.ways * columns);
          }
        }
        write(t, way, word, values);
      }
    }
  }
};

#endif  // __CUDA_ARCH__ >= 900

template <typename T, int kTokens>
__global__ void __launch_bounds__(kStepThreads, 1)
    aggregation_step(const __grid_constant__ StepArgs<T> args) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ StepBarriers barriers;
  asm volatile("griddepcontrol.launch_dependents;");
  Step<T, kTokens>(args, shared, barriers).run();
#endif
}

}  // namespace muddformer::kernels
