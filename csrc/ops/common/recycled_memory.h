// Memory of results on the CPU. malloc gives large blocks back to the system as soon as they are
// freed, so that every page of the next result costs a fault: more time than computing what goes
// into it. Freed results are kept here instead, 256 MiB of them at most, the oldest go first, and
// become results of the same size.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace muddformer::cpu {

// `count` uninitialised tensors of the shape and dtype of `like`, contiguous.
std::vector<at::Tensor> recycled_outputs(int64_t count, const at::Tensor& like);

}  // namespace muddformer::cpu
