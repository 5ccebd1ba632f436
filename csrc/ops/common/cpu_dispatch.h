// The place of a dtype in the tables of CPU kernels.
#pragma once

#include <c10/core/ScalarType.h>

#include "cpu_dtype.h"

namespace muddformer::detail {

inline cpu::KernelDtype cpu_kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return cpu::kFloat64;
    case at::kFloat:
      return cpu::kFloat32;
    case at::kBFloat16:
      return cpu::kBFloat16;
    default:
      return cpu::kFloat16;
  }
}

}  // namespace muddformer::detail
