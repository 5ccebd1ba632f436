// connection_weights and its backward out of PyTorch's own products and elementwise steps.
//
// The order of the steps is the one that the formula is written in, and products take and give the
// dtype of x, so that float32 results differ from the public release's by the last bits alone.
// Folding the norm's factor and scale into the products would save passes and cost that.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <tuple>

#include "checks.h"

namespace muddformer {

struct ConnectionWeightsActivations {
  at::Tensor factor;  // r = rsqrt(mean(x^2) + eps), [tokens, 1], accumulation type
  at::Tensor normed;  // x * r * scale, [tokens, D], dtype of x
  at::Tensor
      hidden;  // normed W1^T, [tokens, K], rounded to the dtype of x, held in the accumulation type
  at::Tensor gelu;  // GELU(hidden), [tokens, K], dtype of x
  at::Tensor a;     // the weights before the cap, [tokens, C*S], accumulation type
};

inline ConnectionWeightsActivations connection_weights_activations(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate) {
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType wide = accumulation_dtype(dtype);
  const at::Tensor rows = x.to(wide).reshape({x.numel() / x.size(-1), x.size(-1)});
  ConnectionWeightsActivations s;
  s.factor = rows.square().mean(1, /*keepdim=*/true).add_(eps).rsqrt_();
  at::Tensor normed = at::mul(rows, s.factor);
  if (scale.has_value()) normed.mul_(scale->to(wide));
  s.normed = normed.to(dtype);
  s.hidden = at::linear(s.normed, w1).to(wide);
  s.gelu = at::gelu(s.hidden, gelu_approximate).to(dtype);
  s.a = at::linear(s.gelu, w2).to(wide).add_(prior.to(wide).reshape({1, -1}));
  return s;
}

inline at::Tensor connection_weights_composition(const at::Tensor& x, const at::Tensor& w1,
                                                 const at::Tensor& w2, const at::Tensor& prior,
                                                 const std::optional<at::Tensor>& scale, double eps,
                                                 std::string_view gelu_approximate,
                                                 std::optional<double> cap) {
  check_connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor a = connection_weights_activations(x, w1, w2, prior, scale, eps, gelu_approximate).a;
  if (cap.has_value()) a = a.div_(*cap).tanh_().mul_(*cap);
  at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.append(prior.sizes().begin(), prior.sizes().end());
  return a.to(x.scalar_type()).view(shape);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
connection_weights_backward_composition(const at::Tensor& grad_weights,
                                        const std::optional<at::Tensor>& grad_x,
                                        const at::Tensor& x, const at::Tensor& w1,
                                        const at::Tensor& w2, const at::Tensor& prior,
                                        const std::optional<at::Tensor>& scale, double eps,
                                        std::string_view gelu_approximate,
                                        std::optional<double> cap) {
  check_connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap);
  check_connection_weights_backward(grad_weights, grad_x, x, prior);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType wide = accumulation_dtype(dtype);
  const auto s = connection_weights_activations(x, w1, w2, prior, scale, eps, gelu_approximate);
  at::Tensor da = grad_weights.reshape(s.a.sizes()).to(wide);
  if (cap.has_value()) da = at::tanh_backward(da, at::tanh(at::div(s.a, *cap)));
  const at::Tensor grad_prior = da.sum(0).view(prior.sizes()).to(prior.scalar_type());
  const at::Tensor da_narrow = da.to(dtype);
  const at::Tensor grad_w2 = da_narrow.t().mm(s.gelu);
  const at::Tensor dhidden =
      at::gelu_backward(da_narrow.mm(w2).to(wide), s.hidden, gelu_approximate).to(dtype);
  const at::Tensor grad_w1 = dhidden.t().mm(s.normed);
  at::Tensor dnormed = dhidden.mm(w1).to(wide);

  // With n = x r:  dx = r (dn - n <dn, n> / D).
  const at::Tensor n = at::mul(x.to(wide).reshape(s.normed.sizes()), s.factor);
  at::Tensor grad_scale = at::empty({0}, x.options());
  if (scale.has_value()) {
    grad_scale = at::mul(dnormed, n).sum(0).to(scale->scalar_type());
    dnormed.mul_(scale->to(wide));
  }
  const at::Tensor along_n = at::mul(dnormed, n).mean(1, /*keepdim=*/true);
  at::Tensor dx = dnormed.addcmul_(n, along_n, -1).mul_(s.factor);
  if (grad_x.has_value()) dx.add_(grad_x->reshape(dx.sizes()));
  return {dx.to(dtype).view(x.sizes()), grad_w1, grad_w2, grad_prior, grad_scale};
}

}  // namespace muddformer
