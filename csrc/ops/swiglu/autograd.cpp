// Autograd of SwiGLU's product: gate and up are kept, and nothing else.
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

struct SwigluFunction : torch::autograd::Function<SwigluFunction> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate,
                            const std::optional<at::Tensor>& up) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({gate, up.value_or(at::Tensor())});
    return swiglu(gate, up);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const bool fused = !saved[1].defined();
    const PastAutogradInBackward guard(grads);
    const auto [grad_gate, grad_up] =
        swiglu_backward(grads[0], saved[0], fused ? std::nullopt : std::optional(saved[1]));
    return {grad_gate, fused ? at::Tensor() : grad_up};
  }
};

at::Tensor swiglu_autograd(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  check_defined(gate, {"gate"});
  const bool tangents = has_tangent(gate) || has_tangent(up);  // which the function refuses
  if (tangents ||
      (at::GradMode::is_enabled() && (gate.requires_grad() || (up && up->requires_grad())))) {
    return SwigluFunction::apply(gate, up);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return swiglu(gate, up);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  m.impl("swiglu", swiglu_autograd);
  // Differentiating this raises an error that names the op.
  m.impl("swiglu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace muddformer::detail
