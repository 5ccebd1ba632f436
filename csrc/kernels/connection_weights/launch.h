// Host side of the connection weights' launches. The kernels of each dtype are compiled in files of
// their own.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "../common/device.h"
#include "../common/launch.h"
#include "connection_weights.h"

namespace muddformer::kernels {

inline constexpr int kWeightsThreads = 256;  // 8 warps

// K as the kernels pad it, with rows of zeros.
constexpr int padded_hidden(int hidden) {
  return (hidden + 63) / 64 * 64;
}

// Launches blocks with as much shared memory as they need, in clusters. On devices that can, they
// come while the kernel before may still run: each kernel calls wait_for_kernel_before() first.
template <typename... Parameters, typename... Args>
cudaError_t launch_wide(void (*kernel)(Parameters...), const Device& device, int64_t blocks,
                        int cluster, int threads, int shared_bytes, cudaStream_t stream,
                        const Args&... args) {
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  const cudaError_t error = allow_shared_bytes(kernel, shared_bytes);
  if (error != cudaSuccess) return error;
  const Launch launch(blocks, device.bulk_copy ? cluster : 1, threads, shared_bytes, stream,
                      device.bulk_copy);
  return cudaLaunchKernelEx(&launch.config, kernel, args...);
}

template <typename T>
cudaError_t weights_forward(const ConnectionWeightsForward& p, const Device& device,
                            cudaStream_t stream);
template <typename T>
cudaError_t weights_hidden_backward(const ConnectionWeightsHiddenBackward& p, const Device& device,
                                    cudaStream_t stream);
template <typename T>
cudaError_t weights_input_backward(const ConnectionWeightsInputBackward& p, const Device& device,
                                   cudaStream_t stream);

// The same with the instructions of Hopper, for the shapes and devices that these take.
bool on_hopper(const ConnectionWeightsShape& shape, const Device& device);
cudaError_t weights_forward_hopper(const ConnectionWeightsForward& p, const Device& device,
                                   cudaStream_t stream);
cudaError_t weights_input_backward_hopper(const ConnectionWeightsInputBackward& p,
                                          const Device& device, cudaStream_t stream);
// Blocks that share a split of the tokens in the input's backward.
int input_blocks(const ConnectionWeightsShape& shape, const Device& device);

// The hidden rows' backward: tokens and columns of K of a block, and blocks whose tokens are added
// up before they leave the chip.
inline constexpr int kHiddenTokens = 64;
inline constexpr int kSlab = 64;
inline constexpr int kHiddenCluster = 2;  // four would leave multiprocessors idle
constexpr int64_t hidden_backward_groups(int64_t tokens, int cluster) {
  return (tokens + cluster * kHiddenTokens - 1) / (cluster * kHiddenTokens);
}

// Columns of D that a block of the input's backward owns.
constexpr int input_columns(int hidden) {
  return padded_hidden(hidden) <= 192 ? 128 : 64;
}

// Bytes of shared memory that the kernels need at least: with rings of two stages.
constexpr int forward_shared_bytes(int hidden) {
  const int padded = padded_hidden(hidden), cluster = padded <= 256 ? 1 : 2;
  const int stages = 2 * (128 + padded) * 64 * 2;
  const int epilogue =
      128 * padded * 4 + 128 / cluster * padded * 2 + (padded <= 192 ? 2 * 64 * padded * 2 : 0);
  return (stages > epilogue ? stages : epilogue) + 2048;
}
constexpr int hidden_backward_shared_bytes(int outputs) {
  const int row = (outputs + 63) / 64 * 128, padded = (outputs + 15) / 16 * 16;
  const int e_and_w2 = (kHiddenTokens + padded) * kSlab * 2, sums = padded * kSlab * 4;
  return kHiddenTokens * (row + 16 + kSlab * 2) + kMaxOutputs * 4 +
         (e_and_w2 > sums ? e_and_w2 : sums);
}
constexpr int input_backward_shared_bytes(int hidden) {
  const int padded = padded_hidden(hidden), row = input_columns(hidden) * 2;
  return padded * row + 2 * (2 * 64 * row + 64 * padded * 2);
}

}  // namespace muddformer::kernels
