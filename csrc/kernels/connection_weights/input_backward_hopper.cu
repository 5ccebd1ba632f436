// Backward of the connection weights, the rows of D, on Hopper (compute capability 9.0a):
//
//   dx = grad_x + e W1 - x coefficient,   partials of e^T x
//
// As input_backward.cuh, whose tensor cores wait for its loads of shared memory;
// here they fetch their operands themselves. A block owns 128 columns of D, whose part of W1 stays
// in shared memory, and a range of tokens. One thread brings 64 tokens of x, grad_x and e at a time
// into a ring of stages. Two warpgroups own 64 of the columns each: dx = e W1, and x^T e, whose
// sums stay in registers until the end and are computed while dx is finished. dx takes grad_x's
// place in the stage and leaves it as a box. Two blocks add their x^T e before it leaves the chip.
// K is padded to KB boxes of 64.
//
// With 33 sources (K 192), 8192 x 2048, neither memory (half of its speed) nor the tensor cores are
// busy all the time: what the 8 warps do between the products, and waiting, is the rest.
#include "../common/cluster.cuh"
#include "../common/tensor_copy.cuh"
#include "../common/tensor_core.cuh"
#include "../common/vector.cuh"
#include "../common/warpgroup.cuh"
#include "launch.h"

namespace muddformer::kernels {
namespace {

constexpr int kColumns = 128;
constexpr int kTokens = 64;
constexpr int kGroups = kColumns / 64;  // warpgroups, each with a box of x, grad_x and W1
constexpr int kConsumers = kGroups * 128;
constexpr int kStagesAtMost = 4;
constexpr int kBlocks = 2;  // of a cluster: they add their parts of e^T x

}  // namespace

template <int KB>
struct InputHopperLayout {
  static constexpr int kGrad = kGroups * kBoxBytes;  // in a stage, after x
  static constexpr int kE = 2 * kGroups * kBoxBytes;
  static constexpr int kStageBytes = kE + KB * kBoxBytes;
  static constexpr int kW1Bytes = kGroups * KB * kBoxBytes;
  static constexpr int bytes(int stages) {  // and to align it
    return 1024 + kW1Bytes + stages * kStageBytes;
  }
};

namespace {

struct Matrices {
  CUtensorMap x, grad_x, w1, e, dx;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

struct Barriers {
  uint64_t full[kStagesAtMost], empty[kStagesAtMost], w1;
};

// The producer: one thread.
template <int KB>
__device__ __forceinline__ void load_stages(const ConnectionWeightsInputBackward& p,
                                            const Matrices& matrices, Barriers& barriers,
                                            uint32_t w1, int stages, int64_t token0, int64_t count,
                                            int64_t column0) {
  using L = InputHopperLayout<KB>;
  const bool with_grad = p.grad_x != nullptr && p.dx != nullptr;
  barrier_expect(&barriers.w1, L::kW1Bytes);
  for (int g = 0; g < kGroups; ++g) {
    for (int k = 0; k < KB; ++k) {
      load_box(w1 + (g * KB + k) * kBoxBytes, matrices.w1, column0 + 64 * g, 64 * k, &barriers.w1);
    }
  }
  RingPlace place;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = token0 + i * kTokens;
    const uint32_t stage = w1 + L::kW1Bytes + place.index * L::kStageBytes;
    uint64_t* full = &barriers.full[place.index];
    if (i >= stages) barrier_wait(&barriers.empty[place.index], place.phase ^ 1);
    barrier_expect(full, L::kStageBytes - (with_grad ? 0 : kGroups * kBoxBytes));
    for (int k = 0; k < KB; ++k) {
      load_box(stage + L::kE + k * kBoxBytes, matrices.e, 64 * k, token, full);
    }
    for (int g = 0; g < kGroups; ++g) {
      load_box(stage + g * kBoxBytes, matrices.x, column0 + 64 * g, token, full);
      if (with_grad) {
        load_box(stage + L::kGrad + g * kBoxBytes, matrices.grad_x, column0 + 64 * g, token, full);
      }
    }
    place.advance(stages);
  }
}

// dx of a warpgroup's box out of e W1, in the place of grad_x. Four words at a time are loaded
// before the first is used.
template <typename T>
__device__ __forceinline__ void finish_box(const unsigned char* x_box, unsigned char* grad_box,
                                           bool with_grad, const float (&product)[32],
                                           const float (&coefficient)[2]) {
  constexpr int kAhead = 4;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;  // and 8 below
#pragma unroll
  for (int first = 0; first < 16; first += kAhead) {
    uint32_t x_word[kAhead], grad_word[kAhead] = {};
    int place[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int n = (first + i) / 2, half = i % 2;
      place[i] = row * 128 + half * 1024 + ((n ^ (row & 7)) << 4) + lane % 4 * 4;
      x_word[i] = *reinterpret_cast<const uint32_t*>(x_box + place[i]);
    }
    if (with_grad) {
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        grad_word[i] = *reinterpret_cast<const uint32_t*>(grad_box + place[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      float x[2], dx[2];
      unpack_word<T>(x_word[i], x);
      unpack_word<T>(grad_word[i], dx);
#pragma unroll
      for (int j = 0; j < 2; ++j) dx[j] += product[2 * (first + i) + j] - x[j] * coefficient[i % 2];
      *reinterpret_cast<uint32_t*>(grad_box + place[i]) = pack_word<T>(dx);
    }
  }
}

// Of e^T x a block of the cluster finishes the half with its rank of the rows and gets it from the
// other block, thread by thread.
template <int KB, int rank>
__device__ __forceinline__ void add_blocks(const ConnectionWeightsInputBackward& p,
                                           unsigned char* shared, int64_t split, int64_t column0,
                                           const float (&sums)[32 * KB]) {
  constexpr int kHalf = 16 * KB, kOwn = rank * kHalf, kOther = kHalf - kOwn;
  const int group = threadIdx.x / 128, warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const uint32_t there = address_of_rank(shared_address(shared) + threadIdx.x * 16, 1 - rank);
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const float* v = sums + kOther + i;
    store_four_to_cluster(there + i / 4 * kConsumers * 16, {v[0], v[1], v[2], v[3]});
  }
  cluster_sync<kBlocks>();
  float* partials = p.w1_partials + split * p.shape.hidden * p.shape.dim;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const int64_t row = (kOwn + i) / 4 * 8 + lane % 4 * 2 + i % 2;
    const int64_t column = column0 + 64 * group + warp * 16 + lane / 4 + i / 2 % 2 * 8;
    const float other =
        reinterpret_cast<const float*>(shared)[(i / 4 * kConsumers + threadIdx.x) * 4 + i % 4];
    if (row < p.shape.hidden && column < p.shape.dim) {
      partials[row * p.shape.dim + column] = sums[kOwn + i] + other;
    }
  }
}

// The parts of the coefficients of this lane's two rows of a tile, by slab.
template <int KB>
__device__ __forceinline__ void load_coefficients(const ConnectionWeightsInputBackward& p,
                                                  int64_t token, float (&parts)[KB][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = token + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
#pragma unroll
    for (int k = 0; k < KB; ++k) {
      parts[k][half] = row < p.shape.tokens ? p.coefficient[k * p.shape.tokens + row] : 0;
    }
  }
}

template <typename T, int KB>
__device__ __forceinline__ void consume_stages(const ConnectionWeightsInputBackward& p,
                                               const Matrices& matrices, Barriers& barriers,
                                               unsigned char* shared, int stages, int64_t token0,
                                               int64_t count, int64_t column0,
                                               float (&outer)[32 * KB]) {
  using L = InputHopperLayout<KB>;
  const int group =
      __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // the compiler sees: one a warp
  const int lane = threadIdx.x % 32;
  const uint64_t w1 = operand_rows_of_k(shared_address(shared) + group * KB * kBoxBytes);
  const bool want_dx = p.dx != nullptr;
  const bool with_grad = p.grad_x != nullptr;
  column0 += 64 * group;
  float parts[KB][2];  // a tile ahead
  load_coefficients<KB>(p, token0, parts);
  RingPlace place;
  int last = 0;
  barrier_wait(&barriers.w1, 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t token = token0 + i * kTokens;
    unsigned char* stage = shared + L::kW1Bytes + place.index * L::kStageBytes;
    unsigned char* x_box = stage + group * kBoxBytes;
    unsigned char* grad_box = stage + L::kGrad + group * kBoxBytes;
    const uint64_t x = operand_rows_of_k(shared_address(x_box));
    const uint64_t e_left = operand_columns_of_k(shared_address(stage) + L::kE);
    const uint64_t e_right = operand_rows_of_k(shared_address(stage) + L::kE);
    barrier_wait(&barriers.full[place.index], place.phase);

    float coefficient[2] = {};
#pragma unroll
    for (int k = 0; k < 2 * KB; ++k) coefficient[k % 2] += parts[k / 2][k % 2];
    load_coefficients<KB>(p, token + kTokens, parts);

    // Both products, wanted or not: the tensor cores run on only past code without branches.
    float product[32];
    warpgroup_fence();
#pragma unroll
    for (int k = 0; k < 4 * KB; ++k) {
      warpgroup_multiply<T, 0, 1>(product, e_left + k / 4 * kOperandBox + k % 4 * kColumnsStep,
                                  w1 + k * kRowsStep, k > 0);
    }
    warpgroup_commit();
#pragma unroll
    for (int k = 0; k < kTokens / 16; ++k) {
      warpgroup_multiply<T, 1, 1>(outer, x + k * kRowsStep, e_right + k * kRowsStep, 1);
    }
    warpgroup_commit();
    // The stage before: its dx has had time to leave.
    if (i > 0) {
      if (threadIdx.x % 128 == 0) wait_for_stores();
      if (lane == 0) barrier_arrive(&barriers.empty[last]);
    }
    warpgroup_wait<1>();
    warpgroup_settle(product);
    if (want_dx) {
      finish_box<T>(x_box, grad_box, with_grad, product, coefficient);
      proxy_fence();
      asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
      if (threadIdx.x % 128 == 0) {
        store_box(matrices.dx, column0, token, shared_address(grad_box));
      }
    }
    warpgroup_wait<0>();
    warpgroup_settle(outer);
    last = place.index;
    place.advance(stages);
  }
  if (threadIdx.x % 128 == 0) wait_for_stores();
}

#endif

template <typename T, int KB>
__global__ void __launch_bounds__(kConsumers + 32, 1)
    weights_input_backward_hopper_kernel(const __grid_constant__ Matrices matrices,
                                         const __grid_constant__ ConnectionWeightsInputBackward p,
                                         int stages) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ unsigned char unaligned[];
  __shared__ Barriers barriers;
  unsigned char* shared = unaligned + (-shared_address(unaligned) & 1023u);
  const int slices = static_cast<int>((p.shape.dim + kColumns - 1) / kColumns);
  const int rank = static_cast<int>(blockIdx.x % kBlocks);
  const int64_t split = blockIdx.x / kBlocks / slices, part = split * kBlocks + rank;
  const int64_t column0 = static_cast<int64_t>(blockIdx.x / kBlocks % slices) * kColumns;
  const int64_t tiles = (p.shape.tokens + kTokens - 1) / kTokens;
  const int64_t parts = int64_t{p.splits} * kBlocks, first = tiles * part / parts;
  const int64_t count = tiles * (part + 1) / parts - first;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      barrier_init(&barriers.full[i], 1);
      barrier_init(&barriers.empty[i], kConsumers / 32);
    }
    barrier_init(&barriers.w1, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_kernel_before();
  if (threadIdx.x < kConsumers) {
    float outer[32 * KB] = {};
    consume_stages<T, KB>(p, matrices, barriers, shared, stages, first * kTokens, count, column0,
                          outer);
    if (p.w1_partials == nullptr) return;
    cluster_arrive_relaxed<kBlocks>();
    cluster_wait<kBlocks>();  // the rings give way to the halves that the blocks send each other
    if (rank == 0) {
      add_blocks<KB, 0>(p, shared, split, column0, outer);
    } else {
      add_blocks<KB, 1>(p, shared, split, column0, outer);
    }
  } else if (threadIdx.x == kConsumers) {
    load_stages<KB>(p, matrices, barriers, shared_address(shared), stages, first * kTokens, count,
                    column0);
  }
#endif
}

template <typename T, int KB>
cudaError_t launch(const ConnectionWeightsInputBackward& p, const Device& device,
                   const Matrices& matrices, cudaStream_t stream) {
  int stages = kStagesAtMost;
  while (InputHopperLayout<KB>::bytes(stages) + static_cast<int>(sizeof(uint64_t)) * 16 >
         device.shared_bytes)
    --stages;
  const int64_t slices = (p.shape.dim + kColumns - 1) / kColumns;
  return launch_wide(weights_input_backward_hopper_kernel<T, KB>, device,
                     slices * p.splits * kBlocks, kBlocks, kConsumers + 32,
                     InputHopperLayout<KB>::bytes(stages), stream, matrices, p, stages);
}

template <typename T>
cudaError_t launch(const ConnectionWeightsInputBackward& p, const Device& device,
                   const Matrices& matrices, cudaStream_t stream) {
  switch (padded_hidden(p.shape.hidden) / 64) {
    case 1:
      return launch<T, 1>(p, device, matrices, stream);
    case 2:
      return launch<T, 2>(p, device, matrices, stream);
    default:
      return launch<T, 3>(p, device, matrices, stream);
  }
}

}  // namespace

bool on_hopper(const ConnectionWeightsShape& shape, const Device& device) {
#ifdef MUDDFORMER_SM90A
  constexpr bool kBuilt = true;
#else
  constexpr bool kBuilt = false;
#endif
  return kBuilt && device.hopper && padded_hidden(shape.hidden) <= 192 &&
         shape.tokens <= INT_MAX - kTokens;
}

int input_blocks(const ConnectionWeightsShape& shape, const Device& device) {
  return on_hopper(shape, device) ? kBlocks : 1;
}

cudaError_t weights_input_backward_hopper(const ConnectionWeightsInputBackward& p,
                                          const Device& device, cudaStream_t stream) {
  const ConnectionWeightsShape& s = p.shape;
  Matrices matrices{};
  cudaError_t error = describe_matrix(matrices.x, s.dtype, p.x, s.tokens, s.dim);
  const auto describe = [&](CUtensorMap& map, const void* matrix, int64_t rows, int64_t columns) {
    if (error == cudaSuccess && matrix != nullptr)
      error = describe_matrix(map, s.dtype, matrix, rows, columns);
  };
  describe(matrices.w1, p.w1, s.hidden, s.dim);
  describe(matrices.e, p.grad_hidden, s.tokens, s.hidden);
  describe(matrices.grad_x, p.grad_x, s.tokens, s.dim);
  describe(matrices.dx, p.dx, s.tokens, s.dim);
  if (error != cudaSuccess) return error;
  return s.dtype == DType::BFloat16 ? launch<__nv_bfloat16>(p, device, matrices, stream)
                                    : launch<__half>(p, device, matrices, stream);
}

}  // namespace muddformer::kernels
