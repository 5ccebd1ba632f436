// Checks and launch of depth_aggregation_step.h.
#include <algorithm>
#include <atomic>

#include "../common/device.h"
#include "../common/launch.h"
#include "depth_aggregation_step.h"
#include "layer.cuh"

namespace muddformer::kernels {
namespace {

constexpr int kMaxStepDim = 1 << 16;
constexpr int kMaxStepHidden = 1 << 14;
constexpr int kMaxDevices = 64;

bool valid(const AggregationStep& p) {
  return p.tokens >= 0 && p.dim >= 1 && p.sources >= 1 && p.ways >= 1 && p.hidden >= 0;
}

// Whether the kernel can take it, but for the device and its shared memory.
bool possible(const AggregationStep& p, int vector) {
  if (p.tokens > kMaxStepTokens || p.dim > kMaxStepDim || p.dim % vector != 0 ||
      p.sources > kMaxStepSources || p.ways > kMaxStepWays || p.hidden > kMaxStepHidden ||
      p.hidden % 4 != 0 || !aligned(p.w1) || !aligned(p.w2) || !aligned(p.scale)) {
    return false;
  }
  for (int j = 0; j < p.sources; ++j) {
    if (!aligned(p.x[j]) || p.x_stride[j] % vector != 0) return false;
  }
  for (int c = 0; c < p.ways; ++c) {
    if (!aligned(p.y[c]) || !aligned(p.norm_weight[c]) || !aligned(p.norm_bias[c])) return false;
  }
  return true;
}

template <typename T>
StepArgs<T> step_args(const AggregationStep& p) {
  StepArgs<T> args;
  args.normed_ways = args.biased_ways = 0;
  for (int j = 0; j < p.sources; ++j) {
    args.source[j] = {static_cast<const T*>(p.x[j]), p.x_stride[j]};
  }
  for (int c = 0; c < p.ways; ++c) {
    args.y[c] = static_cast<T*>(p.y[c]);
    args.norm_weight[c] = p.norm_weight[c];
    args.norm_bias[c] = p.norm_bias[c];
    if (p.norm_weight[c] != nullptr) args.normed_ways |= 1u << c;
    if (p.norm_bias[c] != nullptr) args.biased_ways |= 1u << c;
  }
  args.w1 = static_cast<const T*>(p.w1);
  args.w2 = static_cast<const T*>(p.w2);
  args.prior = p.prior;
  args.scale = p.scale;
  args.eps = p.eps;
  args.norm_eps = p.norm_eps;
  args.cap = p.cap;
  args.inverse_dim = 1.0f / static_cast<float>(p.dim);
  args.wide = p.wide;
  args.gelu_tanh = p.gelu_tanh;
  args.layer_norm = p.layer_norm;
  args.tokens = static_cast<int>(p.tokens);
  args.dim = static_cast<int>(p.dim);
  args.sources = p.sources;
  args.padded = (p.sources + 15) / 16 * 16;
  args.ways = p.ways;
  args.chunks = (p.ways + 3) / 4;
  args.hidden = p.hidden;
  return args;
}

// What a kernel may use on the current device; found out once.
struct Limits {
  int large = 0;   // clusters of 16 blocks that run side by side
  int small = 0;   // clusters of 8
  int shared = 0;  // bytes of a block
};

template <typename Kernel>
cudaError_t find_limits(Kernel kernel, const Device& device, Limits& limits) {
  cudaFuncAttributes code{};
  cudaError_t error = cudaFuncGetAttributes(&code, kernel);
  if (error != cudaSuccess) return error;
  // The kernel's own variables take the rest.
  limits.shared = device.shared_bytes - static_cast<int>(code.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared);
  if (error != cudaSuccess) return error;
  const Launch small(8, 8, kStepThreads, limits.shared, nullptr, true);
  error = cudaOccupancyMaxActiveClusters(&limits.small, kernel, &small.config);
  if (error != cudaSuccess) return error;
  // More than 8 blocks need permission, and a device with groups of so many multiprocessors.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) ==
      cudaSuccess) {
    const Launch large(16, 16, kStepThreads, limits.shared, nullptr, true);
    if (cudaOccupancyMaxActiveClusters(&limits.large, kernel, &large.config) != cudaSuccess) {
      limits.large = 0;
    }
  }
  (void)cudaGetLastError();  // a cluster that is too large is no error of ours
  return cudaSuccess;
}

template <typename T, int kTokens, bool kOnce = false>
cudaError_t step_limits(const Device& device, Limits& limits) {
  // One word per device, zero until known: threads that come at the same time store the same word.
  static std::atomic<uint64_t> known[kMaxDevices];
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  const uint64_t word = index < kMaxDevices ? known[index].load(std::memory_order_relaxed) : 0;
  if (word != 0) {
    limits = {static_cast<int>(word & 0xffff), static_cast<int>(word >> 16 & 0xffff),
              static_cast<int>(word >> 32)};
    return cudaSuccess;
  }
  error = find_limits(aggregation_step<T, kTokens, kOnce>, device, limits);
  if (error != cudaSuccess || index >= kMaxDevices) return error;
  known[index].store(static_cast<uint64_t>(limits.shared) << 32 |
                         static_cast<uint64_t>(limits.small) << 16 |
                         static_cast<uint64_t>(limits.large),
                     std::memory_order_relaxed);
  return cudaSuccess;
}

// Whether the kernel with kOnce can take it. (A thread then has columns for one pass.)
template <typename T>
bool once(const StepArgs<T>& p, int row_vectors) {
  return p.blocks_log2 == 4 && p.chunks == 1 && p.hidden > 0 && p.rows <= 16 &&
         row_vectors <= p.threads && row_vectors % 32 == 0 && 4 * p.padded <= p.threads &&
         p.padded <= 64 && p.scale == nullptr;
}

template <typename T, int kTokens>
cudaError_t launch(const AggregationStep& p, const Device& device, cudaStream_t stream) {
  Limits limits;
  cudaError_t error = step_limits<T, kTokens>(device, limits);
  if (error != cudaSuccess) return error;
  const int clusters = (static_cast<int>(p.tokens) + kTokens - 1) / kTokens;
  // As many as a device allows; those that do not fit at once run one after the other.
  const int blocks = limits.large > 0 ? 16 : 8;
  StepArgs<T> args = step_args<T>(p);
  const int row_vectors = args.dim / kVector<T>;
  const int rounds = (row_vectors + kStepThreads - 1) / kStepThreads;
  // A thread has a vector of x, and later an entry of A.
  const int threads = std::max({((row_vectors + rounds - 1) / rounds + 31) / 32 * 32,
                                std::min(4 * args.chunks * args.padded, kStepThreads), 128});
  args.threads = threads;
  args.blocks_log2 = blocks == 16 ? 4 : 3;
  args.rows = (args.hidden + 4 * blocks - 1) / (4 * blocks) * 4;
  args.vectors = (row_vectors + blocks - 1) / blocks;
  args.stride = args.vectors | 1;
  args.passes = (args.vectors * 16 + threads - 1) / threads;
  args.warp_sources = (args.sources * 32 + threads - 1) / threads;
  args.owned_log2 = 4;
  while (kTokens * 4 * args.chunks * args.padded > blocks << args.owned_log2) ++args.owned_log2;
  args.places = step_shared(args, kTokens);
  if (args.places.bytes > limits.shared) return cudaErrorNotSupported;
  // A block has a multiprocessor to itself: two would share its way to the L2 cache.
  const int bytes = std::max(args.places.bytes, limits.shared / 2 + 1);
  const Launch launch(clusters * blocks, blocks, threads, bytes, stream, true);
  if constexpr (sizeof(T) == 2) {
    if (once(args, row_vectors)) {
      Limits same;  // as of the other, whose variables are the same; this permits the launch
      error = step_limits<T, kTokens, true>(device, same);
      if (error != cudaSuccess) return error;
      return cudaLaunchKernelEx(&launch.config, aggregation_step<T, kTokens, true>, args);
    }
  }
  return cudaLaunchKernelEx(&launch.config, aggregation_step<T, kTokens, false>, args);
}

// Clusters are to run side by side. Several tokens to a cluster read W1 once for all of them, but
// take longer, and more shared memory.
template <typename T>
cudaError_t launch_tokens(const AggregationStep& p, const Device& device, cudaStream_t stream) {
  if (!possible(p, kVector<T>)) return cudaErrorNotSupported;
  Limits limits;
  cudaError_t error = step_limits<T, 1>(device, limits);
  if (error != cudaSuccess) return error;
  const int clusters = limits.large > 0 ? limits.large : limits.small;
  if (clusters == 0) return cudaErrorNotSupported;
  error = cudaErrorNotSupported;
  if (p.tokens > 2 * clusters) error = launch<T, 4>(p, device, stream);
  if (error == cudaErrorNotSupported && p.tokens > clusters) {
    error = launch<T, 2>(p, device, stream);
  }
  return error == cudaErrorNotSupported ? launch<T, 1>(p, device, stream) : error;
}

}  // namespace

int aggregation_step_tokens(DType dtype) {
  Device device;
  const bool possible =
      dtype != DType::Float64 && current_device(device) == cudaSuccess && device.bulk_copy;
  return possible ? kMaxStepTokens : 0;
}

cudaError_t launch_aggregation_step(const AggregationStep& p, cudaStream_t stream) {
  if (!valid(p)) return cudaErrorInvalidValue;
  if (p.tokens == 0) return cudaSuccess;
  Device device;
  const cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  if (!device.bulk_copy) return cudaErrorNotSupported;
  switch (p.dtype) {
    case DType::Float32:
      return launch_tokens<float>(p, device, stream);
    case DType::BFloat16:
      return launch_tokens<__nv_bfloat16>(p, device, stream);
    case DType::Float16:
      return launch_tokens<__half>(p, device, stream);
    case DType::Float64:
      return cudaErrorNotSupported;
  }
  return cudaErrorInvalidValue;
}

}  // namespace muddformer::kernels
