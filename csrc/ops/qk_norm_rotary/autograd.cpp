// Autograd of norms of heads and rotation: queries and keys are kept, and without norms nothing but
// the tables.
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

std::optional<at::Tensor> optional(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional(tensor) : std::nullopt;
}

struct QkNormRotaryFunction : torch::autograd::Function<QkNormRotaryFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static variable_list forward(AutogradContext* ctx, const at::Tensor& q, const at::Tensor& k,
                               const at::Tensor& cos, const at::Tensor& sin,
                               const std::optional<at::Tensor>& q_weight,
                               const std::optional<at::Tensor>& k_weight, double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [to_q, to_k] = qk_norm_rotary(q, k, cos, sin, q_weight, k_weight, eps);
    const at::Tensor none;
    const bool norms = q_weight.has_value();
    ctx->save_for_backward({norms ? q : none, norms ? k : none, cos, sin, q_weight.value_or(none),
                            k_weight.value_or(none)});
    ctx->saved_data["eps"] = eps;
    return {to_q, to_k};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool norms = saved[4].defined();
    const std::array<bool, 2> wanted{norms && ctx->needs_input_grad(4),
                                     norms && ctx->needs_input_grad(5)};
    const PastAutogradInBackward guard(grads);
    const auto [grad_q, grad_k, grad_q_weight, grad_k_weight] = qk_norm_rotary_backward(
        grads[0], grads[1], optional(saved[0]), optional(saved[1]), saved[2], saved[3],
        optional(saved[4]), optional(saved[5]), ctx->saved_data["eps"].toDouble(), wanted);
    const at::Tensor none;
    return {grad_q,
            grad_k,
            none,
            none,
            wanted[0] ? grad_q_weight : none,
            wanted[1] ? grad_k_weight : none,
            none};
  }
};

std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_autograd(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos, const at::Tensor& sin,
    const std::optional<at::Tensor>& q_weight, const std::optional<at::Tensor>& k_weight,
    double eps) {
  for (const auto& [tensor, name] :
       {std::pair(q, "q"), std::pair(k, "k"), std::pair(cos, "cos"), std::pair(sin, "sin")}) {
    check_defined(tensor, {name});
  }
  const bool tangents = has_tangent(q) || has_tangent(k) || has_tangent(q_weight) ||
                        has_tangent(k_weight);  // which the function refuses
  if (tangents || (at::GradMode::is_enabled() && (q.requires_grad() || k.requires_grad() ||
                                                  (q_weight && q_weight->requires_grad()) ||
                                                  (k_weight && k_weight->requires_grad())))) {
    variable_list results = QkNormRotaryFunction::apply(q, k, cos, sin, q_weight, k_weight, eps);
    return {std::move(results[0]), std::move(results[1])};
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return qk_norm_rotary(q, k, cos, sin, q_weight, k_weight, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  m.impl("qk_norm_rotary", qk_norm_rotary_autograd);
  // Differentiating this raises an error that names the op.
  m.impl("qk_norm_rotary_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace muddformer::detail
