// connection_weights and its backward out of PyTorch's own products and small elementwise steps.
//
// The norm's factor r = rsqrt(mean(x^2) + eps) is a number per token and its scale a vector over D, so
// that RMSNorm(x) W1^T = r * (x (W1 * scale)^T): x is read once for r and once by the product, and no
// normed copy of it is written. Everything per token past the first product is small: [tokens, K], [tokens, C*S].
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "checks.h"

namespace muddformer {

struct ConnectionWeightsActivations {
  at::Tensor x;       // [tokens, D]
  at::Tensor w1;      // W1 * scale, [K, D]
  at::Tensor factor;  // r, [tokens, 1], accumulation type
  at::Tensor p;       // x w1^T, [tokens, K], accumulation type
  at::Tensor gelu;    // GELU(r p), [tokens, K], dtype of x
  at::Tensor a;       // the weights before the cap, [tokens, C*S], accumulation type
};

inline ConnectionWeightsActivations connection_weights_activations(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate) {
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType wide = accumulation_dtype(dtype);
  const int64_t width = x.size(-1);
  ConnectionWeightsActivations s;
  s.x = x.reshape({x.numel() / std::max<int64_t>(1, width), width});
  s.w1 = scale.has_value() ? at::mul(w1.to(wide), scale->to(wide)).to(dtype) : w1;
  const at::Tensor norm = at::linalg_vector_norm(s.x, 2, at::IntArrayRef({1}), true, wide);
  s.factor = norm.square_().div_(static_cast<double>(width)).add_(eps).rsqrt_();
  s.p = at::linear(s.x, s.w1).to(wide);
  s.gelu = at::gelu(at::mul(s.p, s.factor), gelu_approximate).to(dtype);
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
  at::Tensor a =
      connection_weights_activations(x, w1, w2, prior, scale, eps, gelu_approximate).a;
  if (cap.has_value()) a = a.div_(*cap).tanh_().mul_(*cap);
  at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.append(prior.sizes().begin(), prior.sizes().end());
  return a.to(x.scalar_type()).view(shape);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
connection_weights_backward_composition(
    const at::Tensor& grad_weights, const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
    const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
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
  const at::Tensor dh =
      at::gelu_backward(da_narrow.mm(w2).to(wide), at::mul(s.p, s.factor), gelu_approximate);
  const at::Tensor dp = at::mul(dh, s.factor).to(dtype);
  at::Tensor grad_w1 = dp.t().mm(s.x);
  at::Tensor grad_scale = at::empty({0}, x.options());
  if (scale.has_value()) {
    const at::Tensor product = grad_w1.to(wide);
    grad_scale = at::mul(product, w1.to(wide)).sum(0).to(scale->scalar_type());
    grad_w1 = at::mul(product, scale->to(wide)).to(dtype);
  }
  // dL/dr = sum_k dh p and dr/dx = -r^3 x / D: one number per token times x.
  const at::Tensor along_x = at::mul(dh, s.p).sum(1, /*keepdim=*/true)
                                 .mul_(s.factor.pow(3))
                                 .mul_(-1.0 / static_cast<double>(x.size(-1)));
  at::Tensor dx = dp.mm(s.w1).to(wide).addcmul_(s.x.to(wide), along_x);
  if (grad_x.has_value()) dx.add_(grad_x->reshape(dx.sizes()));
  return {dx.to(dtype).view(x.sizes()), grad_w1, grad_w2, grad_prior, grad_scale};
}

}  // namespace muddformer
