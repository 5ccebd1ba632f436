// Where the parts of a block are operators of the library, and where they are PyTorch's steps.
#pragma once

#include <ATen/core/Tensor.h>

namespace muddformer {

// On CUDA, if this is a build for it: on a CPU nothing is gained.
bool runs_operators(const at::Tensor& x);

}  // namespace muddformer
