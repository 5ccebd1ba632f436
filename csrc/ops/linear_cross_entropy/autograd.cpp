// Autograd of head and loss. A loss that is summed up has its gradients made in the forward, which
// has the logits: the backward only multiplies them by the gradient of the sum. Losses that are
// returned one by one have gradients which nobody knows before the backward; it makes the logits
// again.
//
// The gradients that are kept take the bytes of one gradient of the head in float32, which the
// backward has to make first of all anyway, and of one hidden state. Making the logits again would
// cost one more product of the three.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr size_t kDifferentiable = 3;  // hidden, weight, bias

std::array<bool, 3> requiring_gradients(const at::Tensor& hidden, const at::Tensor& weight,
                                        const std::optional<at::Tensor>& bias) {
  return {hidden.requires_grad(), weight.requires_grad(),
          bias.has_value() && bias->requires_grad()};
}

at::ScalarType dtype_of(const AutogradContext* ctx, size_t i) {
  return static_cast<at::ScalarType>(ctx->saved_data.at("dtypes").toIntVector()[i]);
}

void keep_dtypes(AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                 const std::optional<at::Tensor>& bias) {
  const auto number = [](const at::Tensor& t) { return static_cast<int64_t>(t.scalar_type()); };
  ctx->saved_data["dtypes"] =
      std::vector<int64_t>{number(hidden), number(weight), number(bias.value_or(hidden))};
}

// What is kept does not depend on the inputs for autograd, so that a second derivative would be
// silently wrong.
void check_first_derivative() {
  TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(),
                              "muddformer::linear_cross_entropy: expected a backward without "
                              "create_graph, because second derivatives are not implemented");
}

// The sum of the losses.
struct SummedLoss : torch::autograd::Function<SummedLoss> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& targets, const TokenLossOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [losses, grad_hidden, grad_weight, grad_bias] =
        linear_cross_entropy_losses(hidden, weight, targets, bias, std::nullopt, options,
                                    requiring_gradients(hidden, weight, bias));
    ctx->save_for_backward({grad_hidden, grad_weight, grad_bias});
    keep_dtypes(ctx, hidden, weight, bias);
    return losses.sum();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_derivative();
    const variable_list kept = ctx->get_saved_variables();
    variable_list result(kDifferentiable + 2);
    for (size_t i = 0; i < kDifferentiable; ++i) {
      if (!ctx->needs_input_grad(i)) continue;
      // One pass and one rounding, and the factor is not rounded.
      result[i] = at::empty_like(kept[i], kept[i].options().dtype(dtype_of(ctx, i)));
      at::mul_out(result[i], kept[i], grads[0]);
    }
    return result;
  }
};

// The losses of all tokens.
struct TokenLosses : torch::autograd::Function<TokenLosses> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& hidden,
                            const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const at::Tensor& targets, const TokenLossOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({hidden, weight, bias.value_or(at::Tensor()), targets});
    keep_dtypes(ctx, hidden, weight, bias);
    ctx->saved_data["ignore_index"] = options.ignore_index;
    ctx->saved_data["label_smoothing"] = options.label_smoothing;
    ctx->saved_data["z_loss"] = options.z_loss;
    ctx->saved_data["chunk"] = options.chunk;
    return std::get<0>(linear_cross_entropy_losses(hidden, weight, targets, bias, std::nullopt,
                                                   options, {false, false, false}));
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    check_first_derivative();
    const variable_list saved = ctx->get_saved_variables();
    const auto bias = saved[2].defined() ? std::optional(saved[2]) : std::nullopt;
    const TokenLossOptions options{
        ctx->saved_data["ignore_index"].toInt(), ctx->saved_data["label_smoothing"].toDouble(),
        ctx->saved_data["z_loss"].toDouble(), ctx->saved_data["chunk"].toOptional<int64_t>()};
    std::array<bool, 3> wanted{};
    for (size_t i = 0; i < kDifferentiable; ++i) wanted[i] = ctx->needs_input_grad(i);
    const auto [losses, grad_hidden, grad_weight, grad_bias] =
        linear_cross_entropy_losses(saved[0], saved[1], saved[3], bias, grads[0], options, wanted);
    const at::Tensor made[] = {grad_hidden, grad_weight, grad_bias};
    variable_list result(kDifferentiable + 2);
    for (size_t i = 0; i < kDifferentiable; ++i) {
      if (wanted[i]) result[i] = made[i].to(dtype_of(ctx, i));
    }
    return result;
  }
};

at::Tensor losses_or_sum(const at::Tensor& hidden, const at::Tensor& weight,
                         const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                         const TokenLossOptions& options, bool sum) {
  const auto wanted = requiring_gradients(hidden, weight, bias);
  if (at::GradMode::is_enabled() && (wanted[0] || wanted[1] || wanted[2])) {
    return sum ? SummedLoss::apply(hidden, weight, bias, targets, options)
               : TokenLosses::apply(hidden, weight, bias, targets, options);
  }
  const at::Tensor losses = std::get<0>(linear_cross_entropy_losses(
      hidden, weight, targets, bias, std::nullopt, options, {false, false, false}));
  return sum ? losses.sum() : losses;
}

// Composite: there is nothing to dispatch on but the losses.
at::Tensor linear_cross_entropy_composite(const at::Tensor& hidden, const at::Tensor& weight,
                                          const at::Tensor& targets,
                                          const std::optional<at::Tensor>& bias,
                                          std::string_view reduction,
                                          const TokenLossOptions& options) {
  check_linear_cross_entropy(hidden, weight, targets, bias, options);
  TORCH_CHECK_VALUE(reduction == "mean" || reduction == "sum" || reduction == "none",
                    "reduction: expected 'mean', 'sum' or 'none', got '", reduction, "'");
  const at::Tensor loss =
      losses_or_sum(hidden, weight, targets, bias, options, /*sum=*/reduction != "none");
  if (reduction != "mean") return loss;
  return loss.div(targets.ne(options.ignore_index).sum().clamp_min(1));
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating this raises an error that names the op.
  m.impl("linear_cross_entropy_losses", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("linear_cross_entropy", flat<linear_cross_entropy_composite>);
}

}  // namespace muddformer::detail
