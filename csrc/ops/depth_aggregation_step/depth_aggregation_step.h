// A whole layer of depth aggregation for decoding (arXiv 2502.12170, section 2, Eq. 5 to 8),
// without gradients:
//
//   A   = GELU(RMSNorm(x) W1^T) W2^T + prior, or prior alone;  optionally A <- cap * tanh(A / cap)
//   Y_c = norm_c(sum_j A[..., c, j] * X_j)
//
// x = X_{S-1} is the newest of the hidden states X_j [..., D]; W1 is [K, D], W2 [C*S, K], prior
// [C, S]; norm_c is the RMSNorm or LayerNorm of what reads stream c, or nothing. On CUDA it is one
// kernel for a few tokens; elsewhere it is composed of connection_weights, depth_aggregate and the
// norms. The function goes through the dispatcher.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

#include "../../macros.h"

namespace muddformer {

/// The streams of one layer of connections, normed or not.
///
/// @param hiddens the S >= 1 sources, each [..., D], the newest last, of one shape, dtype and
/// device.
/// @param w1, w2 the generator's projections [K, D] and [C*S, K], of the dtype of the hidden
/// states;
///   both nullopt for a static layer.
/// @param prior static prior [C, S], of the dtype of the hidden states or float32, like scale and
/// the
///   norms' parameters.
/// @param scale weight of the generator's RMSNorm [D]; nullopt for none.
/// @param eps added to the mean square in the generator's norm, at least 0.
/// @param gelu_approximate "none" (erf form) or "tanh".
/// @param cap positive bound of the weights, or nullopt.
/// @param norm_weights C weights [D], nullopt for a stream that is not normed; or an empty list.
/// @param norm_biases C biases [D] of the normed streams of norm "layer", or nullopt; or an empty
///   list.
/// @param norm "rms", "layer", or "none" where no stream is normed.
/// @param norm_eps added in the streams' norms, at least 0.
/// @return the C streams, each [..., D], new tensors.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came;
///   c10::Error if gradients are enabled and an argument requires one.
MUDDFORMER_API std::vector<at::Tensor> depth_aggregation_step(
    at::TensorList hiddens, const std::optional<at::Tensor>& w1,
    const std::optional<at::Tensor>& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
    std::optional<double> cap, const c10::List<std::optional<at::Tensor>>& norm_weights,
    const c10::List<std::optional<at::Tensor>>& norm_biases, std::string_view norm,
    double norm_eps);

}  // namespace muddformer
