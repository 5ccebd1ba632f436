// The properties of the current device. See device.h.
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "device.h"

namespace muddformer::kernels {
namespace {

// Built like every other kernel here: tells which architecture the code that runs on this device
// was written for. A device of capability 9.0 may run code translated from compute_80, in which the
// ring kernels are empty.
__global__ void probe() {}

constexpr int kMaxDevices = 64;

cudaError_t query(int index, Device& device) {
  const auto attribute = [&](cudaDeviceAttr which, int& value) {
    return cudaDeviceGetAttribute(&value, which, index);
  };
  int major = 0;
  int minor = 0;
  cudaFuncAttributes code{};
  cudaError_t error = attribute(cudaDevAttrMultiProcessorCount, device.multiprocessors);
  if (error == cudaSuccess) {
    error = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_bytes);
  }
  if (error == cudaSuccess) error = attribute(cudaDevAttrComputeCapabilityMajor, major);
  if (error == cudaSuccess) error = attribute(cudaDevAttrComputeCapabilityMinor, minor);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, probe);
  device.bulk_copy = major >= 9 && code.ptxVersion >= 90;
  device.hopper = major == 9 && minor == 0;
  return error;
}

}  // namespace

cudaError_t current_device(Device& device) {
  // One word per device, zero until known: threads that come at the same time store the same word.
  static std::atomic<uint64_t> known[kMaxDevices];
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  if (index >= kMaxDevices) return query(index, device);
  uint64_t word = known[index].load(std::memory_order_relaxed);
  if (word == 0) {
    error = query(index, device);
    if (error != cudaSuccess) return error;
    word = static_cast<uint64_t>(device.multiprocessors) << 32 |
           static_cast<uint64_t>(device.shared_bytes) << 2 | (device.bulk_copy ? 2 : 0) |
           (device.hopper ? 1 : 0);
    known[index].store(word, std::memory_order_relaxed);
  }
  device.multiprocessors = static_cast<int>(word >> 32);
  device.shared_bytes = static_cast<int>((word & 0xffffffff) >> 2);
  device.bulk_copy = (word & 2) != 0;
  device.hopper = (word & 1) != 0;
  return cudaSuccess;
}

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;  // bytes by device and kernel
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& known = allowed[{index, kernel}];
  if (bytes <= known) return cudaSuccess;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) known = bytes;
  return error;
}

}  // namespace muddformer::kernels
