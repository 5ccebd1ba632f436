// What the operator's backends know of a linear layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace muddformer::detail {

/// linear() whose weight and bias are of the dtype of x.
at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& residual);

/// Gradients of x [..., in], weight [out, in] and bias [out], of shape [0] where they are not
/// wanted.
using LinearGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// @param grad gradient of y [..., out], of the dtype of x.
/// @param weight of the dtype of x.
/// @param dtype of the gradients of weight and bias: that of x or float32.
LinearGradients linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& weight, at::ScalarType dtype,
                                std::array<bool, 3> wanted);

/// linear() with the copies of weight and bias that autocast keeps, of the dtype of x; nullopt: there
/// are none.
at::Tensor linear_of_copies(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual,
                            const std::optional<at::Tensor>& weight_copy,
                            const std::optional<at::Tensor>& bias_copy);

void check_linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                  bool casts);
void check_linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           at::ScalarType dtype);

}  // namespace muddformer::detail
