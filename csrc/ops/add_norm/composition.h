// PyTorch's steps for residual addition and norm.
#pragma once

#include <ATen/ATen.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {

inline AddNormForward add_norm_composition(const at::Tensor& x, const at::Tensor& residual,
                                           const at::Tensor& weight,
                                           const std::optional<at::Tensor>& bias,
                                           const AddNormOptions& options) {
  const at::ScalarType wide = accumulation_dtype(residual.scalar_type());
  const at::Tensor sum = (residual + x).contiguous();
  at::Tensor normed = sum.to(wide);
  at::Tensor mean = at::empty({0}, sum.options().dtype(wide));
  if (options.norm == "layer") {
    mean = normed.mean(-1);
    normed = normed - mean.unsqueeze(-1);
  }
  const at::Tensor rstd = normed.square().mean(-1).add_(options.eps).rsqrt_();
  normed = normed * rstd.unsqueeze(-1) * weight.to(wide);
  if (bias.has_value()) normed = normed + bias->to(wide);
  return {sum, normed.to(options.dtype.value_or(sum.scalar_type())), rstd, mean};
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward_composition(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& grad_normed, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& mean, std::string_view norm,
    at::ScalarType x_dtype, std::array<bool, 2> wanted) {
  const at::ScalarType wide = rstd.scalar_type();
  const bool layer = norm == "layer";
  const at::Tensor dy = grad_normed.to(wide), r = rstd.unsqueeze(-1);
  const at::Tensor n = (layer ? sum.to(wide) - mean.unsqueeze(-1) : sum.to(wide)) * r;
  const at::Tensor g = dy * weight.to(wide);
  at::Tensor grad = g - n * (g * n).mean(-1, true);
  if (layer) grad = grad - g.mean(-1, true);
  grad = grad * r;
  if (grad_sum.has_value()) grad = grad + grad_sum->to(wide);
  const auto summed = [&](bool is_wanted, const at::Tensor& rows) {
    if (!is_wanted) return at::empty({0}, weight.options());
    return rows.reshape({-1, weight.size(0)}).sum(0).to(weight.scalar_type());
  };
  const at::Tensor grad_x =
      x_dtype == sum.scalar_type() ? at::empty({0}, sum.options()) : grad.to(x_dtype).contiguous();
  return {grad.to(sum.scalar_type()).contiguous(), grad_x, summed(wanted[0], dy * n),
          summed(wanted[1], dy)};
}

}  // namespace muddformer::detail
