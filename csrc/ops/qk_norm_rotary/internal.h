// What the operator's backends know of norms and rotation.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "qk_norm_rotary.h"

namespace muddformer::detail {

using QkGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Gradients of q, k [B, T, H, E] and of the weights, [0] where they are not wanted.
///
/// @param grad_q [B, T, H, E] in any memory layout.
/// @param grad_k likewise.
/// @param q what the forward was given; nullopt without norms.
/// @param k likewise.
/// @param wanted whether the gradients of the weights are.
QkGradients qk_norm_rotary_backward(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                    const std::optional<at::Tensor>& q,
                                    const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                    const at::Tensor& sin,
                                    const std::optional<at::Tensor>& q_weight,
                                    const std::optional<at::Tensor>& k_weight, double eps,
                                    std::array<bool, 2> wanted);

void check_qk_norm_rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                          const at::Tensor& sin, const std::optional<at::Tensor>& q_weight,
                          const std::optional<at::Tensor>& k_weight, double eps);
void check_qk_norm_rotary_backward(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                   const std::optional<at::Tensor>& q,
                                   const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                   const at::Tensor& sin, const std::optional<at::Tensor>& q_weight,
                                   const std::optional<at::Tensor>& k_weight, double eps,
                                   std::array<bool, 2> wanted);

}  // namespace muddformer::detail
