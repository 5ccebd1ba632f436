// What the launchers need to know of the current device, looked up once per device.
#pragma once

#include <cuda_runtime_api.h>

namespace muddformer::kernels {

struct Device {
  int multiprocessors;
  bool bulk_copy;  // compute capability 9.0 or later, and this binary holds code for it
};

cudaError_t current_device(Device& device);

// Bytes of shared memory that a block on the current device can have when it asks for them.
cudaError_t shared_memory_limit(int& bytes);

}  // namespace muddformer::kernels
