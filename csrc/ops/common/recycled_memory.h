// Memory of results on the CPU. malloc gives large blocks back to the system as soon as they are
// freed, so that every page of the next result costs a fault: more time than computing what goes
// into it. Freed results are kept here instead and become results of the same size. At most
// MUDDFORMER_CPU_CACHE_MIB MiB of them are kept (an environment variable, read at the first use:
// 256 where it is not set, 0 keeps nothing), the oldest go first, and what nobody has wanted for
// five seconds is given back to the system, also when no operator is called any more: a thread that
// sleeps until then sees to it, and ends when nothing is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace muddformer::cpu {

// An uninitialised contiguous tensor, for a temporary too: the next call gets the same memory.
at::Tensor recycled_output(at::IntArrayRef sizes, at::ScalarType dtype);

// `count` uninitialised tensors of the shape and dtype of `like`, contiguous.
// Both throw c10::ValueError if MUDDFORMER_CPU_CACHE_MIB is not a whole number from 0 to 2^20.
std::vector<at::Tensor> recycled_outputs(int64_t count, const at::Tensor& like);

}  // namespace muddformer::cpu
