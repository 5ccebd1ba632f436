// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

// The shape of x without D, and then `last`.
at::Tensor empty_of_tokens(const at::Tensor& x, c10::SymIntArrayRef last, at::ScalarType dtype) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.append(last.begin(), last.end());
  return at::empty_symint(shape, x.options().dtype(dtype));
}

WeightsAndKept connection_weights_forward_meta(const at::Tensor& x, const at::Tensor& w1,
                                               const at::Tensor& w2, const at::Tensor& prior,
                                               const GeneratorOptions& options) {
  check_connection_weights(x, w1, w2, prior, options);
  return {empty_of_tokens(x, prior.sym_sizes(), x.scalar_type()),
          empty_of_tokens(x, {w1.sym_size(0)}, x.scalar_type()),
          empty_of_tokens(x, {}, accumulation_dtype(x.scalar_type()))};
}

at::Tensor connection_weights_meta(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                                   const at::Tensor& prior, const GeneratorOptions& options) {
  check_connection_weights(x, w1, w2, prior, options);
  return empty_of_tokens(x, prior.sym_sizes(), x.scalar_type());
}

WeightsGradients connection_weights_backward_meta(const at::Tensor& grad_weights,
                                                  const std::optional<at::Tensor>& grad_x,
                                                  const at::Tensor& x, const at::Tensor& w1,
                                                  const at::Tensor& w2, const at::Tensor& prior,
                                                  const WeightsForward& forward,
                                                  std::array<bool, 5> wanted) {
  check_connection_weights_backward(grad_weights, grad_x, x, w1, w2, prior, forward);
  const auto gradient = [&](int i, const std::optional<at::Tensor>& tensor) {
    return wanted[i] ? empty_of(tensor, x) : empty_none(x);
  };
  return {gradient(0, x), gradient(1, w1), gradient(2, w2), gradient(3, prior),
          gradient(4, forward.options.scale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("connection_weights", flat<connection_weights_meta>);
  m.impl("connection_weights_forward", flat<connection_weights_forward_meta>);
  m.impl("connection_weights_backward", flat<connection_weights_backward_meta>);
}

}  // namespace muddformer::detail
