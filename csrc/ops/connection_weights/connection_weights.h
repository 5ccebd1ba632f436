// Per-token connection weights from the newest hidden state (arXiv 2502.12170, section 2,
// Eq. 6 to 8):
//
//   A = GELU(RMSNorm(x) W1^T) W2^T + prior,   optionally A <- cap * tanh(A / cap)
//
// x is [..., D], W1 [K, D], W2 [C*S, K] (row c*S + j is source j of way c), prior [C, S], the
// norm's optional scale [D]; A is [..., C, S]. float64, float32, bfloat16 or float16; prior and
// scale may be float32 beside any of them. The norm, the GELU, the prior and the cap are computed
// in float32 (float64 for float64). The functions go through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../../macros.h"
#include "../common/generator.h"

namespace muddformer {

/// Connection weights [..., C, S], of the dtype of x.
///
/// @param x newest hidden state [..., D].
/// @param w1 projection [K, D], of the dtype of x.
/// @param w2 projection [C*S, K], of the dtype of x.
/// @param prior static prior [C, S], of the dtype of x or float32.
/// @param options the norm's scale and eps, the form of the GELU, the cap.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API at::Tensor connection_weights(const at::Tensor& x, const at::Tensor& w1,
                                             const at::Tensor& w2, const at::Tensor& prior,
                                             const GeneratorOptions& options = {});

/// connection_weights() that also hands x on: (weights, x).
///
/// Later layers use the returned x; the gradient that they accumulate joins this one's in one pass.
MUDDFORMER_API std::tuple<at::Tensor, at::Tensor> connection_weights_chained(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const GeneratorOptions& options = {});

}  // namespace muddformer
