// Which of the CPU kernels, compiled once for each instruction set and dtype, is to run.
#pragma once

#include <ATen/Version.h>
#include <c10/core/ScalarType.h>

#include <string>

#include "cpu_dtype.h"

namespace muddformer::detail {

// The instruction set that PyTorch itself has chosen, as "AVX512", "AVX2" or another name; the
// environment variable ATEN_CPU_CAPABILITY lowers it.
inline std::string cpu_capability() {
  return at::get_cpu_capability();
}

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
