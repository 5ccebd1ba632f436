// Autograd of the connection weights. The chained form returns x after the weights; the gradient
// that later layers accumulated for x comes back through it.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "../common/autograd_functions.h"
#include "connection_weights.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// autograd itself has no clear word for an undefined input.
void check_all_defined(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                       const at::Tensor& prior) {
  check_defined(x, {"x"});
  check_defined(w1, {"w1"});
  check_defined(w2, {"w2"});
  check_defined(prior, {"prior"});
}

template <bool kChained>
struct ConnectionWeights : torch::autograd::Function<ConnectionWeights<kChained>> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& w1,
                               const at::Tensor& w2, const at::Tensor& prior,
                               const std::optional<at::Tensor>& scale,
                               const GeneratorOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [weights, hidden, factor] = connection_weights_forward(x, w1, w2, prior, options);
    const at::Tensor none;
    ctx->save_for_backward({x, w1, w2, prior, scale.value_or(none),
                            options.cap.has_value() ? weights : none, hidden, factor});
    ctx->saved_data["gelu_approximate"] = options.gelu_approximate;
    ctx->saved_data["cap"] = options.cap;
    ctx->set_materialize_grads(false);
    variable_list outputs = {std::move(weights)};
    if (kChained) outputs.push_back(x);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::Tensor none;
    const at::Tensor& grad_x = kChained ? grads[1] : none;
    if (!grads[0].defined()) return {grad_x, none, none, none, none, none};
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const at::Tensor& tensor) {
      return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
    };
    std::array<bool, 5> wanted{};
    for (size_t i = 0; i < wanted.size(); ++i) {
      wanted[i] = saved[i].defined() && ctx->needs_input_grad(i);
    }
    const WeightsForward forward{
        {optional(saved[4]), 0, ctx->saved_data["gelu_approximate"].toStringRef(),
         ctx->saved_data["cap"].toOptional<double>()},
        optional(saved[5]),
        saved[6],
        saved[7]};
    const PastAutogradInBackward guard(grads);
    const auto [dx, dw1, dw2, dprior, dscale] = connection_weights_backward(
        grads[0], optional(grad_x), saved[0], saved[1], saved[2], saved[3], forward, wanted);
    const auto if_wanted = [&](size_t i, const at::Tensor& grad) {
      return wanted[i] ? grad : none;
    };
    return {if_wanted(0, dx),     if_wanted(1, dw1),    if_wanted(2, dw2),
            if_wanted(3, dprior), if_wanted(4, dscale), none};
  }
};

// Whether a backward can come: only then is anything kept for it.
bool needs_gradient(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                    const at::Tensor& prior, const GeneratorOptions& options) {
  return at::GradMode::is_enabled() &&
         (x.requires_grad() || w1.requires_grad() || w2.requires_grad() || prior.requires_grad() ||
          (options.scale.has_value() && options.scale->requires_grad()));
}

at::Tensor connection_weights_autograd(const at::Tensor& x, const at::Tensor& w1,
                                       const at::Tensor& w2, const at::Tensor& prior,
                                       const GeneratorOptions& options) {
  check_all_defined(x, w1, w2, prior);
  const bool tangents = has_tangent(x) || has_tangent(w1) || has_tangent(w2) ||
                        has_tangent(prior) || has_tangent(options.scale);  // which are refused
  if (!tangents && !needs_gradient(x, w1, w2, prior, options)) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return connection_weights(x, w1, w2, prior, options);
  }
  return ConnectionWeights<false>::apply(x, w1, w2, prior, options.scale, options)[0];
}

// Composite: there is nothing to dispatch on but the forward inside.
std::tuple<at::Tensor, at::Tensor> connection_weights_chained_composite(
    const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
    const GeneratorOptions& options) {
  if (!needs_gradient(x, w1, w2, prior, options)) {
    const PastAutograd guard(x, w1, w2, prior, options.scale);
    return {connection_weights(x, w1, w2, prior, options), x};
  }
  check_all_defined(x, w1, w2, prior);
  variable_list outputs = ConnectionWeights<true>::apply(x, w1, w2, prior, options.scale, options);
  return {std::move(outputs[0]), std::move(outputs[1])};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  m.impl("connection_weights", flat<connection_weights_autograd>);
  // Differentiating these raises an error that names the op.
  m.impl("connection_weights_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("connection_weights_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("connection_weights_chained", flat<connection_weights_chained_composite>);
}

}  // namespace muddformer::detail
