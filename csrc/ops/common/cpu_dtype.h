// Places in the tables of CPU kernels. Plain data only: kernels are compiled with the flags of their
// instruction set and must share no inline function with the rest of the library that could carry
// those instructions there.
#pragma once

namespace muddformer::cpu {

enum KernelDtype { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };

}  // namespace muddformer::cpu
