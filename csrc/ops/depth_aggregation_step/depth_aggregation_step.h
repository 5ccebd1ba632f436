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

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "../../macros.h"
#include "../common/generator.h"
#include "../common/norms.h"

namespace muddformer {

/// The streams of one layer of connections, normed or not.
///
/// @param hiddens the S >= 1 sources, each [..., D], the newest last, of one shape, dtype and
///   device.
/// @param w1 the generator's projection [K, D], of the dtype of the hidden states; nullopt for a
///   static layer.
/// @param w2 its second one [C*S, K], of the same dtype; nullopt for a static layer.
/// @param prior static prior [C, S], of the dtype of the hidden states or float32, like the
///   generator's scale and the norms' parameters.
/// @param options see connection_weights(); no scale for a static layer.
/// @param norms of the streams: kind, eps, weights and biases alone.
/// @return the C streams, each [..., D], new tensors.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came;
///   c10::Error if gradients are enabled and an argument requires one.
MUDDFORMER_API std::vector<at::Tensor> depth_aggregation_step(at::TensorList hiddens,
                                                              const std::optional<at::Tensor>& w1,
                                                              const std::optional<at::Tensor>& w2,
                                                              const at::Tensor& prior,
                                                              const GeneratorOptions& options = {},
                                                              const StreamNorms& norms = {});

/// Whether depth_aggregation_step() is one kernel for tokens like these: on CUDA (compute
/// capability 9.0 or newer, and code for it in this build), not of float64, and no more than 64 of
/// them. Beyond that cuBLAS's products are the better choice, or there is no kernel. A layer that
/// the kernel does not take (D of no whole vectors of 16 bytes, K no multiple of 4, more than 128
/// hidden states or 8 ways) is composed all the same.
///
/// @param newest the newest hidden state [..., D]; it may be fake.
MUDDFORMER_API bool fuses_step(const at::Tensor& newest);

}  // namespace muddformer
