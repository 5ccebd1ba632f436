#include <torch/library.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "add_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias=None, str norm='rms', float "
      "eps=1e-06, ScalarType? dtype=None) -> (Tensor, Tensor)",
      tags);
  m.def(
      "add_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, str norm, float "
      "eps, ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "add_norm_backward(Tensor? grad_sum, Tensor grad_normed, Tensor sum, Tensor weight, Tensor "
      "rstd, Tensor mean, str norm, ScalarType x_dtype, bool[2] wanted) -> (Tensor, Tensor, "
      "Tensor, Tensor)",
      tags);
}

std::tuple<at::Tensor, at::Tensor> add_norm(const at::Tensor& x, const at::Tensor& residual,
                                            const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias,
                                            const AddNormOptions& options) {
  static const detail::Operator<decltype(add_norm)> op("add_norm");
  return op(x, residual, weight, bias, options);
}

namespace detail {

AddNormForward add_norm_forward(const at::Tensor& x, const at::Tensor& residual,
                                const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                const AddNormOptions& options) {
  static const Operator<decltype(add_norm_forward)> op("add_norm_forward");
  return op(x, residual, weight, bias, options);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& grad_normed, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& mean, std::string_view norm,
    at::ScalarType x_dtype, std::array<bool, 2> wanted) {
  static const Operator<decltype(add_norm_backward)> op("add_norm_backward");
  return op(grad_sum, grad_normed, sum, weight, rstd, mean, norm, x_dtype, wanted);
}

// [..., D] like the sum, of its dtype, or of 16 bits beside float32.
static void check_branch(at::ScalarType dtype, const char* name, at::ScalarType sum) {
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  TORCH_CHECK_TYPE(dtype == sum || (sum == at::kFloat && narrow), name, ": expected dtype ", sum,
                   " of residual", sum == at::kFloat ? ", BFloat16 or Half" : "", ", got ", dtype);
}

static void check_of_norm(const at::Tensor& tensor, const char* name, const at::Tensor& residual) {
  check_defined(tensor, {name});
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == residual.scalar_type() || tensor.scalar_type() == at::kFloat, name,
      ": expected dtype ", residual.scalar_type(), " of residual or Float, got ",
      tensor.scalar_type());
  check_same_device(tensor, {name}, residual, "residual");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == residual.sym_size(-1), name,
                    ": expected shape [D] with D = ", residual.sym_size(-1), " of residual, got ",
                    tensor.sym_sizes());
}

static void check_kind(std::string_view norm) {
  TORCH_CHECK_VALUE(norm == "rms" || norm == "layer", "norm: expected 'rms' or 'layer', got '",
                    norm, "'");
}

static void check_rows(const at::Tensor& tensor, const char* name) {
  check_floating(tensor, {name});
  TORCH_CHECK_VALUE(tensor.dim() >= 1 && tensor.sym_size(-1) >= 1, name,
                    ": expected shape [..., D] with D >= 1, got ", tensor.sym_sizes());
}

void check_add_norm(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, const AddNormOptions& options) {
  check_rows(residual, "residual");
  check_floating(x, {"x"});
  check_branch(x.scalar_type(), "x", residual.scalar_type());
  check_same_device(x, {"x"}, residual, "residual");
  TORCH_CHECK_VALUE(x.sym_sizes() == residual.sym_sizes(), "x: expected shape ",
                    residual.sym_sizes(), " of residual, got ", x.sym_sizes());
  check_of_norm(weight, "weight", residual);
  check_kind(options.norm);
  if (bias.has_value()) {
    TORCH_CHECK_VALUE(options.norm == "layer",
                      "bias: expected None for the norm 'rms', got a tensor");
    check_like(*bias, {"bias"}, weight, "weight");
  }
  check_eps(options.eps, "eps");
  if (options.dtype.has_value()) {
    TORCH_CHECK_TYPE(options.dtype == residual.scalar_type() || options.dtype == x.scalar_type(),
                     "dtype: expected ", residual.scalar_type(), " of residual or ",
                     x.scalar_type(), " of x, got ", *options.dtype);
  }
}

void check_add_norm_backward(const std::optional<at::Tensor>& grad_sum,
                             const at::Tensor& grad_normed, const at::Tensor& sum,
                             const at::Tensor& weight, const at::Tensor& rstd,
                             const at::Tensor& mean, std::string_view norm, at::ScalarType x_dtype,
                             std::array<bool, 2> wanted) {
  check_rows(sum, "sum");
  if (grad_sum.has_value()) check_like(*grad_sum, {"grad_sum"}, sum, "sum");
  check_floating(grad_normed, {"grad_normed"});
  check_branch(grad_normed.scalar_type(), "grad_normed", sum.scalar_type());
  check_same_device(grad_normed, {"grad_normed"}, sum, "sum");
  TORCH_CHECK_VALUE(grad_normed.sym_sizes() == sum.sym_sizes(), "grad_normed: expected shape ",
                    sum.sym_sizes(), " of sum, got ", grad_normed.sym_sizes());
  check_of_norm(weight, "weight", sum);
  check_kind(norm);
  check_branch(x_dtype, "x_dtype", sum.scalar_type());
  const auto check_statistic = [&](const at::Tensor& tensor, const char* name) {
    check_defined(tensor, {name});
    const at::ScalarType wide = accumulation_dtype(sum.scalar_type());
    TORCH_CHECK_TYPE(tensor.scalar_type() == wide, name, ": expected dtype ", wide, ", got ",
                     tensor.scalar_type());
    check_same_device(tensor, {name}, sum, "sum");
    const auto leading = sum.sym_sizes().slice(0, sum.dim() - 1);
    TORCH_CHECK_VALUE(tensor.sym_sizes() == leading, name, ": expected shape ", leading,
                      " of sum without D, got ", tensor.sym_sizes());
  };
  check_statistic(rstd, "rstd");
  if (norm == "layer") check_statistic(mean, "mean");
  TORCH_CHECK_VALUE(!wanted[1] || norm == "layer",
                    "wanted: expected no gradient of a bias for the norm 'rms', got True");
}

}  // namespace detail
}  // namespace muddformer
