// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

at::Tensor linear_forward_meta(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& residual) {
  check_linear(x, weight, bias, residual, /*casts=*/false);
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.push_back(weight.sym_size(0));
  const at::ScalarType own = x.scalar_type();
  return at::empty_symint(
      shape, x.options().dtype(residual ? c10::promoteTypes(own, residual->scalar_type()) : own));
}

LinearGradients linear_backward_meta(const at::Tensor& grad, const at::Tensor& x,
                                     const at::Tensor& weight, at::ScalarType dtype,
                                     std::array<bool, 3> wanted) {
  check_linear_backward(grad, x, weight, dtype);
  const at::TensorOptions given = x.options().dtype(dtype);
  return {wanted[0] ? empty_of(x) : empty_none(x),
          wanted[1] ? at::empty_symint(weight.sym_sizes(), given) : at::empty({0}, given),
          wanted[2] ? at::empty_symint({weight.sym_size(0)}, given) : at::empty({0}, given)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("linear_forward", linear_forward_meta);
  m.impl("linear_backward", linear_backward_meta);
}

}  // namespace muddformer::detail
