// Per-token connection weights from the newest hidden state (arXiv 2502.12170, section 2, Eq. 6 to
// 8):
//
//   A = GELU(RMSNorm(x) W1^T) W2^T + prior,   optionally A <- cap * tanh(A / cap)
//
// x is [..., D], W1 [K, D], W2 [C*S, K] (row c*S + j is source j of way c), prior [C, S], the
// norm's optional scale [D]; A is [..., C, S]. float64, float32, bfloat16 or float16; prior and
// scale may be float32 beside any of them. The norm, the GELU, the prior and the cap are computed
// in float32 (float64 for float64). The functions go through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

#include "../../macros.h"

namespace muddformer {

/// Connection weights [..., C, S], of the dtype of x.
///
/// @param x newest hidden state [..., D].
/// @param w1, w2 projections [K, D] and [C*S, K], of the dtype of x.
/// @param prior static prior [C, S], of the dtype of x or float32.
/// @param scale weight of the RMSNorm [D], of the dtype of x or float32; nullopt for none.
/// @param eps added to the mean square inside the norm, at least 0.
/// @param gelu_approximate "none" (erf form) or "tanh".
/// @param cap positive bound of the weights, or nullopt.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API at::Tensor connection_weights(const at::Tensor& x, const at::Tensor& w1,
                                             const at::Tensor& w2, const at::Tensor& prior,
                                             const std::optional<at::Tensor>& scale = std::nullopt,
                                             double eps = 1e-6,
                                             std::string_view gelu_approximate = "none",
                                             std::optional<double> cap = std::nullopt);

/// connection_weights() that also hands x on: (weights, x).
///
/// Later layers use the returned x; the gradient that they accumulate joins this one's in one pass.
MUDDFORMER_API std::tuple<at::Tensor, at::Tensor> connection_weights_chained(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale = std::nullopt, double eps = 1e-6,
    std::string_view gelu_approximate = "none", std::optional<double> cap = std::nullopt);

/// connection_weights() that also returns what its backward reads instead of computing it again.
///
/// @return (weights [..., C, S], h [..., K] = RMSNorm(x) W1^T of the dtype of x, r [...] =
///         rsqrt(mean(x^2) + eps) in float32, float64 for float64).
MUDDFORMER_API std::tuple<at::Tensor, at::Tensor, at::Tensor> connection_weights_forward(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale = std::nullopt, double eps = 1e-6,
    std::string_view gelu_approximate = "none", std::optional<double> cap = std::nullopt);

/// Gradients of connection_weights_chained().
///
/// @param grad_weights gradient of the weights [..., C, S].
/// @param grad_x gradient of the handed-on x [..., D]; nullopt stands for zero.
/// @param weights, hidden, factor what connection_weights_forward() has returned; weights may be
///        nullopt where there is no cap.
/// @param wanted which of the five gradients are needed.
/// @return gradients of (x, w1, w2, prior, scale); of shape [0] where one is not wanted, or there
/// is
///         no scale.
MUDDFORMER_API std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
connection_weights_backward(const at::Tensor& grad_weights, const std::optional<at::Tensor>& grad_x,
                            const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                            const at::Tensor& prior, const std::optional<at::Tensor>& scale,
                            const std::optional<at::Tensor>& weights, const at::Tensor& hidden,
                            const at::Tensor& factor, std::string_view gelu_approximate,
                            std::optional<double> cap, std::array<bool, 5> wanted);

}  // namespace muddformer
