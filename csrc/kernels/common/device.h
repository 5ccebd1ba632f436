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

// Permits a kernel so many bytes of dynamic shared memory on the current device; more than 48 KB
// need it. The driver is asked only when a kernel needs more than ever before: it takes long.
cudaError_t allow_shared_bytes(const void* kernel, int bytes);

template <typename... Parameters>
cudaError_t allow_shared_bytes(void (*kernel)(Parameters...), int bytes) {
  return allow_shared_bytes(reinterpret_cast<const void*>(kernel), bytes);
}

}  // namespace muddformer::kernels
