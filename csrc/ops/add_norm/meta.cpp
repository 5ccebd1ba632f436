// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

AddNormForward add_norm_forward_meta(const at::Tensor& x, const at::Tensor& residual,
                                     const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const AddNormOptions& options) {
  check_add_norm(x, residual, weight, bias, options);
  const auto leading = residual.sym_sizes().slice(0, residual.dim() - 1);
  const at::TensorOptions wide =
      residual.options().dtype(accumulation_dtype(residual.scalar_type()));
  const at::TensorOptions normed =
      residual.options().dtype(options.dtype.value_or(residual.scalar_type()));
  return {empty_of(residual), at::empty_symint(residual.sym_sizes(), normed),
          at::empty_symint(leading, wide),
          options.norm == "layer" ? at::empty_symint(leading, wide) : at::empty({0}, wide)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward_meta(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& grad_normed, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& mean, std::string_view norm,
    at::ScalarType x_dtype, std::array<bool, 2> wanted) {
  check_add_norm_backward(grad_sum, grad_normed, sum, weight, rstd, mean, norm, x_dtype, wanted);
  const auto of_norm = [&](bool is_wanted) {
    return is_wanted ? empty_of(weight) : empty_none(weight);
  };
  const at::Tensor grad_x = x_dtype == sum.scalar_type()
                                ? empty_none(sum)
                                : at::empty_symint(sum.sym_sizes(), sum.options().dtype(x_dtype));
  return {empty_of(sum), grad_x, of_norm(wanted[0]), of_norm(wanted[1])};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("add_norm_forward", flat<add_norm_forward_meta>);
  m.impl("add_norm_backward", add_norm_backward_meta);
}

}  // namespace muddformer::detail
