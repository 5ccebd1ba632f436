// What the launchers need to know of the current device, looked up once per device.
#pragma once

#include <cuda_runtime_api.h>

namespace muddformer::kernels {

struct Device {
  int multiprocessors;
  int shared_bytes;  // that a block can have when it asks for them
  bool bulk_copy;    // compute capability 9.0 or later, and this binary holds code for it
  bool hopper;       // compute capability 9.0, which has instructions of its own
};

cudaError_t current_device(Device& device);

}  // namespace muddformer::kernels
