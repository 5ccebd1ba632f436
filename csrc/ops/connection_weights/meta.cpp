// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>

#include "../common/checks.h"

namespace muddformer {
namespace {

at::Tensor empty_like_shape(const at::Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

// The shape of x without D, and then `last`.
at::Tensor empty_of_tokens(const at::Tensor& x, c10::SymIntArrayRef last, at::ScalarType dtype) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.append(last.begin(), last.end());
  return at::empty_symint(shape, x.options().dtype(dtype));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> connection_weights_forward_meta(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
    std::optional<double> cap) {
  check_connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap);
  return {empty_of_tokens(x, prior.sym_sizes(), x.scalar_type()),
          empty_of_tokens(x, {w1.sym_size(0)}, x.scalar_type()),
          empty_of_tokens(x, {}, accumulation_dtype(x.scalar_type()))};
}

at::Tensor connection_weights_meta(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                                   const at::Tensor& prior, const std::optional<at::Tensor>& scale,
                                   double eps, std::string_view gelu_approximate,
                                   std::optional<double> cap) {
  check_connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap);
  return empty_of_tokens(x, prior.sym_sizes(), x.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
connection_weights_backward_meta(const at::Tensor& grad_weights,
                                 const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
                                 const at::Tensor& w1, const at::Tensor& w2,
                                 const at::Tensor& prior, const std::optional<at::Tensor>& scale,
                                 const std::optional<at::Tensor>& weights, const at::Tensor& hidden,
                                 const at::Tensor& factor, std::string_view gelu_approximate,
                                 std::optional<double> cap, std::array<bool, 5> wanted) {
  check_connection_weights(x, w1, w2, prior, scale, 0, gelu_approximate, cap);
  check_connection_weights_backward(grad_weights, grad_x, x, w1, prior, weights, hidden, factor,
                                    cap);
  const auto gradient = [&](int i, const at::Tensor& tensor) {
    return wanted[i] ? empty_like_shape(tensor) : at::empty({0}, x.options());
  };
  return {gradient(0, x), gradient(1, w1), gradient(2, w2), gradient(3, prior),
          scale.has_value() ? gradient(4, *scale) : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("connection_weights", connection_weights_meta);
  m.impl("connection_weights_forward", connection_weights_forward_meta);
  m.impl("connection_weights_backward", connection_weights_backward_meta);
}

}  // namespace muddformer
