// What the operator's backends know of head and loss.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "../common/dispatch.h"
#include "linear_cross_entropy.h"

namespace muddformer::detail {

template <>
struct Spelling<const TokenLossOptions&> {
  using Arguments = Types<int64_t, double, double, std::optional<int64_t>>;
  static TokenLossOptions join(int64_t ignore_index, double label_smoothing, double z_loss,
                               std::optional<int64_t> chunk) {
    return {ignore_index, label_smoothing, z_loss, chunk};
  }
  static auto split(const TokenLossOptions& o) {
    return std::tuple<int64_t, double, double, std::optional<int64_t>>(
        o.ignore_index, o.label_smoothing, o.z_loss, o.chunk);
  }
};

/// Losses [...], and gradients of hidden, weight and bias, of shape [0] where they are not wanted;
/// all float32 (float64 for float64).
using LossesAndGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// The losses of all tokens, and gradients of the sum of grad_losses * losses.
///
/// @param grad_losses of the shape and dtype of the losses; nullopt: 1 for every token.
/// @param wanted whether the gradients of hidden, weight and bias are.
LossesAndGradients linear_cross_entropy_losses(const at::Tensor& hidden, const at::Tensor& weight,
                                               const at::Tensor& targets,
                                               const std::optional<at::Tensor>& bias,
                                               const std::optional<at::Tensor>& grad_losses,
                                               const TokenLossOptions& options,
                                               std::array<bool, 3> wanted);

void check_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                                const TokenLossOptions& options);
// The same of linear_cross_entropy_losses().
void check_losses(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                  const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& grad_losses, const TokenLossOptions& options,
                  std::array<bool, 3> wanted);

}  // namespace muddformer::detail
