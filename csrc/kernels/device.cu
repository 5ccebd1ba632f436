// The properties of the current device. See device.h.
#include <atomic>

#include "device.h"

namespace muddformer::kernels {
namespace {

// Built like every other kernel here: tells which architecture the code that runs on this device
// was written for. A device of capability 9.0 may run code translated from compute_80, in which the
// ring kernels are empty.
__global__ void probe() {}

constexpr int kMaxDevices = 64;

cudaError_t query(int index, Device& device) {
  int major = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  }
  cudaFuncAttributes code{};
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, probe);
  device.bulk_copy = major >= 9 && code.ptxVersion >= 90;
  return error;
}

}  // namespace

cudaError_t current_device(Device& device) {
  // One word per device, zero until known: threads that come at the same time store the same word.
  static std::atomic<unsigned> known[kMaxDevices];
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index >= kMaxDevices) return query(index, device);
  unsigned word = known[index].load(std::memory_order_relaxed);
  if (word == 0) {
    error = query(index, device);
    if (error != cudaSuccess) return error;
    word = 2u * static_cast<unsigned>(device.multiprocessors) + (device.bulk_copy ? 1 : 0);
    known[index].store(word, std::memory_order_relaxed);
  }
  device.multiprocessors = static_cast<int>(word / 2);
  device.bulk_copy = word % 2 != 0;
  return cudaSuccess;
}

cudaError_t shared_memory_limit(int& bytes) {
  int index = 0;
  const cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
}

}  // namespace muddformer::kernels
