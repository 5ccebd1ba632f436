// From logits to losses and gradients on the CPU, compiled once for each instruction set and chosen
// at run time. Plain data only, as csrc/ops/common/cpu_dtype.h says.
#pragma once

#include <cstdint>

#include "../../common/cpu_dtype.h"

namespace muddformer::cpu {

// Tokens t = begin..end-1, see linear_cross_entropy.h for the formula. Losses and gradients are
// float32 (float64 of float64).
struct TokenLosses {
  int64_t classes;          // V
  const void* logits;       // [tokens, V]
  int64_t stride;           // elements from one row of the logits to the next, and of the gradients
  const int64_t* targets;   // [tokens]
  const void* grad_losses;  // [tokens], of the dtype of the losses; nullptr: 1
  void* losses;             // [tokens]
  void* gradients;          // [tokens, V]: may be where logits of the same dtype are; nullptr: none
  int64_t ignore_index;
  double label_smoothing, z_loss;
};

using TokenLossesKernel = void (*)(const TokenLosses&, int64_t begin, int64_t end);

struct TokenLossesKernels {
  TokenLossesKernel of[4];  // the logits' KernelDtype
};

extern const TokenLossesKernels token_losses_default;
#if defined(MUDDFORMER_X86_KERNELS)
extern const TokenLossesKernels token_losses_avx2;
extern const TokenLossesKernels token_losses_avx512;
#endif

}  // namespace muddformer::cpu
