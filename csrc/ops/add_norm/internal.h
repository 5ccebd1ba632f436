// What the operator's backends know of residual addition and norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "../common/dispatch.h"
#include "add_norm.h"

namespace muddformer::detail {

template <>
struct Spelling<const AddNormOptions&> {
  using Arguments = Types<std::string_view, double, std::optional<at::ScalarType>>;
  static AddNormOptions join(std::string_view norm, double eps,
                             std::optional<at::ScalarType> dtype) {
    return {std::string(norm), eps, dtype};
  }
  static auto split(const AddNormOptions& o) {
    return std::tuple<std::string_view, double, std::optional<at::ScalarType>>(o.norm, o.eps,
                                                                               o.dtype);
  }
};

/// Sum, normed tensor, and what the backward wants: 1 / sqrt(...) and mean of every row [...],
/// float32 (float64 for float64); the mean of an RMSNorm is [0].
using AddNormForward = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

AddNormForward add_norm_forward(const at::Tensor& x, const at::Tensor& residual,
                                const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const AddNormOptions& options);

/// Gradients of residual, x, weight and bias. That of x is [0] where it is that of the residual:
/// where both have one dtype. Those of weight and bias are [0] where they are not wanted.
///
/// @param grad_sum gradient that the sum gets elsewhere; nullopt: none.
/// @param x_dtype dtype of x.
/// @param wanted whether the gradients of weight and bias are.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& grad_normed, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& mean, std::string_view norm,
    at::ScalarType x_dtype, std::array<bool, 2> wanted);

void check_add_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, const AddNormOptions& options);
void check_add_norm_backward(const std::optional<at::Tensor>& grad_sum,
                             const at::Tensor& grad_normed, const at::Tensor& sum,
                             const at::Tensor& weight, const at::Tensor& rstd,
                             const at::Tensor& mean, std::string_view norm, at::ScalarType x_dtype,
                             std::array<bool, 2> wanted);

}  // namespace muddformer::detail
