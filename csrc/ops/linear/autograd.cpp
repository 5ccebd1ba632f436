// Autograd of a linear layer. What the product read is kept; the gradients of weight and bias are
// made in the dtype of the parameters themselves, not in that of their copies.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../common/autograd_functions.h"
#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor copy_or_cast(const std::optional<at::Tensor>& copy, const at::Tensor& tensor,
                        at::ScalarType dtype) {
  if (copy) return *copy;
  return tensor.scalar_type() == dtype ? tensor : tensor.to(dtype);
}

at::Tensor forward_of(const at::Tensor& x, const at::Tensor& weight,
                      const std::optional<at::Tensor>& bias,
                      const std::optional<at::Tensor>& residual,
                      const std::optional<at::Tensor>& bias_copy) {
  const auto narrow_bias =
      bias ? std::optional(copy_or_cast(bias_copy, *bias, x.scalar_type())) : std::nullopt;
  return linear_forward(x, weight, narrow_bias, residual);
}

struct LinearFunction : torch::autograd::Function<LinearFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual,
                            const std::optional<at::Tensor>& weight_copy,
                            const std::optional<at::Tensor>& bias_copy) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const at::Tensor read = copy_or_cast(weight_copy, weight, x.scalar_type());
    ctx->save_for_backward({x, read});
    ctx->saved_data["weight"] = static_cast<int64_t>(weight.scalar_type());
    if (bias) ctx->saved_data["bias"] = static_cast<int64_t>(bias->scalar_type());
    if (residual) ctx->saved_data["residual"] = static_cast<int64_t>(residual->scalar_type());
    return forward_of(x, read, bias, residual, bias_copy);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const auto dtype = [ctx](const char* name) {
      return static_cast<at::ScalarType>(ctx->saved_data.at(name).toInt());
    };
    // Inputs that are not there have no number.
    const bool bias = ctx->saved_data.count("bias") != 0;
    const bool residual = ctx->saved_data.count("residual") != 0;
    const std::array<bool, 3> wanted = {ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                        bias && ctx->needs_input_grad(2)};
    variable_list result(6);
    const PastAutogradInBackward guard(grads);
    if (wanted[0] || wanted[1] || wanted[2]) {
      const at::Tensor grad = grads[0].to(saved[0].scalar_type());
      const auto [dx, dw, db] = linear_backward(grad, saved[0], saved[1], dtype("weight"), wanted);
      if (wanted[0]) result[0] = dx;
      if (wanted[1]) result[1] = dw;
      if (wanted[2]) result[2] = db.to(dtype("bias"));
    }
    if (residual && ctx->needs_input_grad(bias ? 3 : 2)) {
      result[3] = grads[0].to(dtype("residual"));
    }
    return result;
  }
};

at::Tensor linear_composite(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual) {
  return linear_of_copies(x, weight, bias, residual, {}, {});
}

}  // namespace

at::Tensor linear_of_copies(const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual,
                            const std::optional<at::Tensor>& weight_copy,
                            const std::optional<at::Tensor>& bias_copy) {
  check_linear(x, weight, bias, residual, /*casts=*/true);
  const auto requires_grad = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->requires_grad();
  };
  if (at::GradMode::is_enabled() && (x.requires_grad() || weight.requires_grad() ||
                                     requires_grad(bias) || requires_grad(residual))) {
    return LinearFunction::apply(x, weight, bias, residual, weight_copy, bias_copy);
  }
  return forward_of(x, copy_or_cast(weight_copy, weight, x.scalar_type()), bias, residual,
                    bias_copy);
}

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating these raises an error that names the op.
  m.impl("linear_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("linear", linear_composite);
}

}  // namespace muddformer::detail
