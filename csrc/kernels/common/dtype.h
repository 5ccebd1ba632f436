// The dtypes that kernels are launched with.
#pragma once

namespace muddformer::kernels {

enum class DType { Float32, Float64, BFloat16, Float16 };

}  // namespace muddformer::kernels
