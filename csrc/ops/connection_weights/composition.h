// connection_weights and its backward out of PyTorch's own products and elementwise steps.
//
// The order of the steps is the one that the formula is written in, and products take and give the
// dtype of x, so that float32 results differ from the public release's by the last bits alone.
// Folding the norm's factor and scale into the products would save passes and cost that.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "internal.h"

namespace muddformer::detail {

inline int64_t token_count(const at::Tensor& x) {
  return x.numel() / x.size(-1);
}

// x r scale [tokens, D] in the dtype of x.
inline at::Tensor normed_rows(const at::Tensor& rows, const at::Tensor& factor,
                              const std::optional<at::Tensor>& scale, at::ScalarType dtype) {
  at::Tensor normed = at::mul(rows, factor);
  if (scale.has_value()) normed.mul_(scale->to(rows.scalar_type()));
  return normed.to(dtype);
}

inline WeightsAndKept connection_weights_forward_composition(const at::Tensor& x,
                                                             const at::Tensor& w1,
                                                             const at::Tensor& w2,
                                                             const at::Tensor& prior,
                                                             const GeneratorOptions& options) {
  check_connection_weights(x, w1, w2, prior, options);
  const auto& [scale, eps, gelu_approximate, cap] = options;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType wide = accumulation_dtype(dtype);
  const int64_t tokens = token_count(x);
  const at::Tensor rows = x.to(wide).reshape({tokens, x.size(-1)});
  const at::Tensor factor = rows.square().mean(1, /*keepdim=*/true).add_(eps).rsqrt_();
  const at::Tensor hidden = at::linear(normed_rows(rows, factor, scale, dtype), w1);
  const at::Tensor gelu = at::gelu(hidden.to(wide), gelu_approximate).to(dtype);
  at::Tensor a = at::linear(gelu, w2).to(wide).add_(prior.to(wide).reshape({1, -1}));
  if (cap.has_value()) a = a.div_(*cap).tanh_().mul_(*cap);
  const at::IntArrayRef leading = x.sizes().slice(0, x.dim() - 1);
  at::DimVector weights_shape(leading), hidden_shape(leading);
  weights_shape.append(prior.sizes().begin(), prior.sizes().end());
  hidden_shape.push_back(w1.size(0));
  return {a.to(dtype).view(weights_shape), hidden.view(hidden_shape), factor.view(leading)};
}

inline at::Tensor connection_weights_composition(const at::Tensor& x, const at::Tensor& w1,
                                                 const at::Tensor& w2, const at::Tensor& prior,
                                                 const GeneratorOptions& options) {
  return std::get<0>(connection_weights_forward_composition(x, w1, w2, prior, options));
}

inline WeightsGradients connection_weights_backward_composition(
    const at::Tensor& grad_weights, const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
    const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const WeightsForward& forward, std::array<bool, 5> wanted) {
  check_connection_weights_backward(grad_weights, grad_x, x, w1, w2, prior, forward);
  const auto& [options, weights, hidden, factor] = forward;
  const auto& [scale, eps, gelu_approximate, cap] = options;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType wide = accumulation_dtype(dtype);
  const int64_t tokens = token_count(x);
  const auto [want_x, want_w1, want_w2, want_prior, want_scale] = wanted;
  const auto none = [&x] { return at::empty({0}, x.options()); };
  at::Tensor dx = none(), dw1 = none(), dw2 = none(), dprior = none(), dscale = none();

  at::Tensor da = grad_weights.reshape({tokens, prior.numel()}).to(wide);
  if (cap.has_value()) {
    da = at::tanh_backward(da, weights->reshape(da.sizes()).to(wide).div(*cap));
  }
  if (want_prior) dprior = da.sum(0).view(prior.sizes()).to(prior.scalar_type());
  const at::Tensor da_narrow = da.to(dtype);
  const at::Tensor h = hidden.reshape({tokens, w1.size(0)}).to(wide);
  if (want_w2) dw2 = da_narrow.t().mm(at::gelu(h, gelu_approximate).to(dtype));
  if (!want_x && !want_w1 && !want_scale) return {dx, dw1, dw2, dprior, dscale};

  const at::Tensor dhidden =
      at::gelu_backward(da_narrow.mm(w2).to(wide), h, gelu_approximate).to(dtype);
  const at::Tensor rows = x.to(wide).reshape({tokens, x.size(-1)}), r = factor.reshape({tokens, 1});
  if (want_w1) dw1 = dhidden.t().mm(normed_rows(rows, r, scale, dtype));
  if (!want_x && !want_scale) return {dx, dw1, dw2, dprior, dscale};

  // With n = x r:  dx = r (dn - n <dn, n> / D).
  at::Tensor dnormed = dhidden.mm(w1).to(wide);
  const at::Tensor n = at::mul(rows, r);
  if (want_scale && scale.has_value()) {
    dscale = at::mul(dnormed, n).sum(0).to(scale->scalar_type());
  }
  if (want_x) {
    if (scale.has_value()) dnormed.mul_(scale->to(wide));
    const at::Tensor along_n = at::mul(dnormed, n).mean(1, /*keepdim=*/true);
    dx = dnormed.addcmul_(n, along_n, -1).mul_(r);
    if (grad_x.has_value()) dx.add_(grad_x->reshape(dx.sizes()));
    dx = dx.to(dtype).view(x.sizes());
  }
  return {dx, dw1, dw2, dprior, dscale};
}

}  // namespace muddformer::detail
