#include <torch/library.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "internal.h"
#include "linear.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None) -> Tensor",
        tags);
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? residual) -> Tensor", tags);
  m.def(
      "linear_backward(Tensor grad, Tensor x, Tensor weight, ScalarType dtype, bool[3] wanted) -> "
      "(Tensor, Tensor, Tensor)",
      tags);
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& residual) {
  static const detail::Operator<decltype(linear)> op("linear");
  return op(x, weight, bias, residual);
}

namespace detail {

at::Tensor linear_forward(const at::Tensor& x, const at::Tensor& weight,
                          const std::optional<at::Tensor>& bias,
                          const std::optional<at::Tensor>& residual) {
  static const Operator<decltype(linear_forward)> op("linear_forward");
  return op(x, weight, bias, residual);
}

LinearGradients linear_backward(const at::Tensor& grad, const at::Tensor& x,
                                const at::Tensor& weight, at::ScalarType dtype,
                                std::array<bool, 3> wanted) {
  static const Operator<decltype(linear_backward)> op("linear_backward");
  return op(grad, x, weight, dtype, wanted);
}

static void check_dtype(const at::Tensor& tensor, const char* name, const at::Tensor& x,
                        bool or_float32) {
  if (!or_float32) return check_same_dtype_device(tensor, {name}, x, "x");
  check_defined(tensor, {name});
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == at::kFloat,
                   name, ": expected dtype ", x.scalar_type(), " of x or Float, got ",
                   tensor.scalar_type());
  check_same_device(tensor, {name}, x, "x");
}

// A tensor of the tokens of x, with `width` columns.
static void check_tokens(const at::Tensor& tensor, const char* name, const at::Tensor& x,
                         const c10::SymInt& width) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.push_back(width);
  TORCH_CHECK_VALUE(tensor.sym_sizes() == c10::SymIntArrayRef(shape), name, ": expected shape ",
                    c10::SymIntArrayRef(shape), ", got ", tensor.sym_sizes());
}

void check_linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual,
                  bool casts) {
  check_floating(x, {"x"});
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) >= 1,
                    "x: expected shape [..., in] with in >= 1, got ", x.sym_sizes());
  check_dtype(weight, "weight", x, casts);
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.sym_size(0) >= 1 && weight.sym_size(1) == x.sym_size(-1),
      "weight: expected shape [out, in] with out >= 1 and in = ", x.sym_size(-1), " of x, got ",
      weight.sym_sizes());
  if (bias.has_value()) {
    check_dtype(*bias, "bias", x, casts);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
                      "bias: expected shape [out] with out = ", weight.sym_size(0),
                      " of weight, got ", bias->sym_sizes());
  }
  if (residual.has_value()) {
    check_dtype(*residual, "residual", x, /*or_float32=*/true);
    check_tokens(*residual, "residual", x, weight.sym_size(0));
  }
}

void check_linear_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                           at::ScalarType dtype) {
  check_linear(x, weight, std::nullopt, std::nullopt, /*casts=*/false);
  check_same_dtype_device(grad, {"grad"}, x, "x");
  check_tokens(grad, "grad", x, weight.sym_size(0));
  TORCH_CHECK_TYPE(dtype == x.scalar_type() || dtype == at::kFloat, "dtype: expected ",
                   x.scalar_type(), " of x or Float, got ", dtype);
}

}  // namespace detail
}  // namespace muddformer
