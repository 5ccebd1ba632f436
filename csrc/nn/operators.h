// Where the parts of a block are operators of the library, and where they are PyTorch's steps.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>

namespace muddformer {

// On CUDA, if this is a build for it: on a CPU nothing is gained.
bool runs_operators(const at::Tensor& x);

// Whether autocast is on for a kind of device.
inline bool autocasts(at::DeviceType device) {
  return at::autocast::is_autocast_available(device) && at::autocast::is_autocast_enabled(device);
}

// Whether operators take a weight or a residual beside tensors of a dtype: of that dtype or float32.
inline bool fits_beside(const at::Tensor& tensor, at::ScalarType dtype) {
  return tensor.scalar_type() == dtype || tensor.scalar_type() == at::kFloat;
}

}  // namespace muddformer
