// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"

namespace muddformer {
namespace {

at::Tensor empty_like_shape(const at::Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

at::Tensor connection_weights_meta(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                                   const at::Tensor& prior, const std::optional<at::Tensor>& scale,
                                   double eps, std::string_view gelu_approximate,
                                   std::optional<double> cap) {
  check_connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap);
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.append(prior.sym_sizes().begin(), prior.sym_sizes().end());
  return at::empty_symint(shape, x.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
connection_weights_backward_meta(const at::Tensor& grad_weights,
                                 const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
                                 const at::Tensor& w1, const at::Tensor& w2,
                                 const at::Tensor& prior, const std::optional<at::Tensor>& scale,
                                 double eps, std::string_view gelu_approximate,
                                 std::optional<double> cap) {
  check_connection_weights(x, w1, w2, prior, scale, eps, gelu_approximate, cap);
  check_connection_weights_backward(grad_weights, grad_x, x, prior);
  return {empty_like_shape(x), empty_like_shape(w1), empty_like_shape(w2), empty_like_shape(prior),
          scale.has_value() ? empty_like_shape(*scale) : at::empty({0}, x.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("connection_weights", connection_weights_meta);
  m.impl("connection_weights_backward", connection_weights_backward_meta);
}

}  // namespace muddformer
