// Autograd of residual addition and norm. Kept are the sum, which is a result, and one float a row
// (two of a LayerNorm). The gradient of the sum comes to the backward from both results, so that
// autograd has nothing to add.
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

struct AddNormFunction : torch::autograd::Function<AddNormFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const at::Tensor& residual, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias,
                               const AddNormOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [sum, normed, rstd, mean] = add_norm_forward(x, residual, weight, bias, options);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({sum, weight, rstd, mean});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["norm"] = options.norm;
    ctx->saved_data["x_dtype"] = static_cast<int64_t>(x.scalar_type());
    return {sum, normed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto x_dtype = static_cast<at::ScalarType>(ctx->saved_data["x_dtype"].toInt());
    const at::Tensor none;
    if (!grads[1].defined()) {
      const at::Tensor& grad = grads[0];
      return {grad.defined() ? grad.to(x_dtype) : none, grad, none, none, none};
    }
    const variable_list saved = ctx->get_saved_variables();
    // Inputs are counted without those that are not there.
    const std::array<bool, 2> wanted{ctx->needs_input_grad(2),
                                     ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(3)};
    const PastAutogradInBackward guard(grads);
    const auto [grad_residual, grad_x, grad_weight, grad_bias] = add_norm_backward(
        grads[0].defined() ? std::optional(grads[0]) : std::nullopt, grads[1], saved[0], saved[1],
        saved[2], saved[3], ctx->saved_data["norm"].toStringRef(), x_dtype, wanted);
    return {x_dtype == grad_residual.scalar_type() ? grad_residual : grad_x, grad_residual,
            wanted[0] ? grad_weight : none, wanted[1] ? grad_bias : none, none};
  }
};

// Composite: there is nothing to dispatch on but the forward inside.
std::tuple<at::Tensor, at::Tensor> add_norm_composite(const at::Tensor& x,
                                                      const at::Tensor& residual,
                                                      const at::Tensor& weight,
                                                      const std::optional<at::Tensor>& bias,
                                                      const AddNormOptions& options) {
  check_add_norm(x, residual, weight, bias, options);
  if (at::GradMode::is_enabled() &&
      (x.requires_grad() || residual.requires_grad() || weight.requires_grad() ||
       (bias.has_value() && bias->requires_grad()))) {
    variable_list results = AddNormFunction::apply(x, residual, weight, bias, options);
    return {std::move(results[0]), std::move(results[1])};
  }
  const PastAutograd guard(x, residual, weight, bias);
  const auto forward = add_norm_forward(x, residual, weight, bias, options);
  return {std::get<0>(forward), std::get<1>(forward)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating these raises an error that names the op.
  m.impl("add_norm_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("add_norm_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("add_norm", flat<add_norm_composite>);
}

}  // namespace muddformer::detail
