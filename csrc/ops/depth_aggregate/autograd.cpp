// Autograd of the aggregation. The chained form returns its sources after its outputs; autograd
// makes aliases of them, and the gradient that later layers accumulated comes back through them.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/autograd_functions.h"
#include "../common/checks.h"
#include "../common/rows.h"
#include "../deferred_flush/internal.h"
#include "depth_aggregate.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <bool kChained>
struct DepthAggregate : torch::autograd::Function<DepthAggregate<kChained>> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static variable_list forward(AutogradContext* ctx, at::TensorList hiddens,
                               const at::Tensor& weights, at::TensorList tickets,
                               int64_t deferred) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved(hiddens.begin(), hiddens.end());
    saved.push_back(weights);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["tickets"] = static_cast<int64_t>(tickets.size());
    ctx->saved_data["deferred"] = deferred;
    ctx->set_materialize_grads(false);
    variable_list outputs = depth_aggregate(hiddens, weights);
    if (kChained) outputs.insert(outputs.end(), hiddens.begin() + deferred, hiddens.end());
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::TensorList hiddens = at::TensorList(saved).slice(0, saved.size() - 1);
    const int64_t deferred = ctx->saved_data["deferred"].toInt();
    const size_t ways = kChained ? grads.size() - (hiddens.size() - deferred) : grads.size();
    const at::TensorList grad_outputs = at::TensorList(grads).slice(0, ways);
    variable_list result(deferred);  // no gradients of deferred sources
    result.insert(result.end(), grads.begin() + static_cast<int64_t>(ways), grads.end());
    const size_t inputs = saved.size() + ctx->saved_data["tickets"].toInt() + 1;
    if (std::any_of(grad_outputs.begin(), grad_outputs.end(),
                    [](const at::Tensor& grad) { return grad.defined(); })) {
      const PastAutogradInBackward guard(grads);
      auto [own, grad_weights] =
          depth_aggregate_backward(optional_tensors(grad_outputs), optional_tensors(result),
                                   hiddens, saved.back(), deferred);
      result.resize(deferred);
      result.insert(result.end(), own.begin(), own.end());
      result.push_back(std::move(grad_weights));
      if (inputs > saved.size() + 1) {
        result.insert(result.end(), grad_outputs.begin(), grad_outputs.end());
        result.push_back(saved.back());
      }
    }
    result.resize(inputs);
    return result;
  }
};

std::vector<at::Tensor> depth_aggregate_autograd(at::TensorList hiddens,
                                                 const at::Tensor& weights) {
  check_all_defined(hiddens, "hiddens");
  check_defined(weights, {"weights"});
  return DepthAggregate<false>::apply(hiddens, weights, at::TensorList(), int64_t{0});
}

// Composite: there is nothing to dispatch on but the forward inside.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_deferred_composite(
    at::TensorList hiddens, const at::Tensor& weights, at::TensorList tickets, int64_t deferred) {
  check_deferral(hiddens, weights, tickets, deferred);
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (!at::GradMode::is_enabled() ||
      !(weights.requires_grad() || std::any_of(hiddens.begin(), hiddens.end(), requires_grad))) {
    const PastAutograd guard(hiddens, weights);
    return {depth_aggregate(hiddens, weights), hiddens.vec()};
  }
  check_all_defined(hiddens, "hiddens");
  check_defined(weights, {"weights"});
  use_tickets(hiddens, tickets, deferred);
  variable_list streams = DepthAggregate<true>::apply(
      at::TensorList(without_edges(hiddens, deferred)), weights, tickets, deferred);
  const auto young = static_cast<int64_t>(hiddens.size()) - deferred;
  std::vector<at::Tensor> handed_on = hiddens.vec();
  std::move(streams.end() - young, streams.end(), handed_on.begin() + deferred);
  streams.erase(streams.end() - young, streams.end());
  return {std::move(streams), std::move(handed_on)};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_chained_composite(
    at::TensorList hiddens, const at::Tensor& weights) {
  return depth_aggregate_deferred_composite(hiddens, weights, {}, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  m.impl("depth_aggregate", depth_aggregate_autograd);
  // Differentiating the backward raises an error that names the op.
  m.impl("depth_aggregate_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("depth_aggregate_chained", depth_aggregate_chained_composite);
  m.impl("depth_aggregate_chained.deferred", depth_aggregate_deferred_composite);
}

}  // namespace muddformer::detail
