// Host side of the connection weights' launches. The kernels of each dtype are compiled in files of
// their own.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "connection_weights.h"
#include "device.h"

namespace muddformer::kernels {

struct WeightsDevice : Device {
  int shared_bytes;  // that a block may have when it asks for it
};

inline cudaError_t current_device(WeightsDevice& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = current_device(static_cast<Device&>(device));
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   index);
  }
  return error;
}

// K as the kernels pad it, with rows of zeros.
constexpr int padded_hidden(int hidden) {
  return (hidden + 63) / 64 * 64;
}

// Launches blocks with as much shared memory as they need, in clusters.
template <typename... Parameters, typename... Args>
cudaError_t launch_wide(void (*kernel)(Parameters...), int64_t blocks, int cluster, int threads,
                        int shared_bytes, cudaStream_t stream, const Args&... args) {
  if (blocks > INT_MAX) return cudaErrorInvalidValue;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T>
cudaError_t weights_forward(const ConnectionWeightsForward& p, const WeightsDevice& device,
                            cudaStream_t stream);
template <typename T>
cudaError_t weights_hidden_backward(const ConnectionWeightsHiddenBackward& p, cudaStream_t stream);
template <typename T>
cudaError_t weights_input_backward(const ConnectionWeightsInputBackward& p,
                                   const WeightsDevice& device, cudaStream_t stream);

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
inline constexpr int kHiddenSumsBytes = 8 * kMaxOutputs * 4;  // of 8 warps
constexpr int hidden_backward_shared_bytes(int hidden, int outputs) {
  const int padded = padded_hidden(hidden);
  const int operands = 64 * ((outputs + 63) / 64 * 128) + (outputs + 15) / 16 * 16 * padded * 2;
  const int products = kHiddenSumsBytes + 64 * (padded + 4) * 4;
  return operands > products ? operands : products;
}
constexpr int input_backward_shared_bytes(int hidden) {
  const int padded = padded_hidden(hidden), row = input_columns(hidden) * 2;
  return padded * row + 2 * (2 * 64 * row + 64 * padded * 2);
}

}  // namespace muddformer::kernels
