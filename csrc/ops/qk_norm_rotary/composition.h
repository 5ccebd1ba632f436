// PyTorch's steps for norms of heads and rotation.
#pragma once

#include <ATen/ATen.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {

// [B, T, H, E] -> [B, T, H, E]; the tables are [T, half], [1, T, half] or [B, T, half].
inline at::Tensor rotated(const at::Tensor& x, const at::Tensor& cos_table,
                          const at::Tensor& sin_table) {
  const int64_t half = cos_table.size(-1), rest = x.size(-1) - 2 * half;
  const at::Tensor cos = cos_table.unsqueeze(-2), sin = sin_table.unsqueeze(-2);
  const at::Tensor a = x.narrow(-1, 0, half), b = x.narrow(-1, half, half);
  return at::cat({(a * cos - b * sin).to(x.scalar_type()), (a * sin + b * cos).to(x.scalar_type()),
                  x.narrow(-1, 2 * half, rest)},
                 -1);
}

inline std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_composition(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    const std::optional<at::Tensor>& q_weight, const std::optional<at::Tensor>& k_weight,
    double eps) {
  const auto one = [&](const at::Tensor& x, const std::optional<at::Tensor>& weight) {
    const at::Tensor normed =
        weight ? at::rms_norm(x, {x.size(-1)}, weight->to(x.scalar_type()), eps) : x;
    return rotated(normed, cos, sin);
  };
  return {one(q, q_weight), one(k, k_weight)};
}

inline QkGradients qk_norm_rotary_backward_composition(
    const at::Tensor& grad_q, const at::Tensor& grad_k, const std::optional<at::Tensor>& q,
    const std::optional<at::Tensor>& k, const at::Tensor& cos, const at::Tensor& sin,
    const std::optional<at::Tensor>& q_weight, const std::optional<at::Tensor>& k_weight,
    double eps, std::array<bool, 2> wanted) {
  const at::ScalarType dtype = grad_q.scalar_type(), wide = accumulation_dtype(dtype);
  const auto one = [&](const at::Tensor& grad, const std::optional<at::Tensor>& given,
                       const std::optional<at::Tensor>& weight,
                       bool is_wanted) -> std::tuple<at::Tensor, at::Tensor> {
    const at::Tensor dn = rotated(grad.to(wide), cos, -sin);
    if (!weight) return {dn.to(dtype).contiguous(), at::empty({0}, grad.options())};
    at::Tensor n = given->to(wide);
    const at::Tensor rstd = n.square().mean(-1, true).add_(eps).rsqrt_();
    n = n * rstd;
    const at::Tensor g = dn * weight->to(wide);
    const at::Tensor dx = (g - n * (g * n).mean(-1, true)) * rstd;
    at::Tensor dw = at::empty({0}, weight->options());
    if (is_wanted) dw = (dn * n).sum({0, 1, 2}).to(weight->scalar_type());
    return {dx.to(dtype).contiguous(), dw};
  };
  const auto [dq, dq_weight] = one(grad_q, q, q_weight, wanted[0]);
  const auto [dk, dk_weight] = one(grad_k, k, k_weight, wanted[1]);
  return {dq, dk, dq_weight, dk_weight};
}

}  // namespace muddformer::detail
