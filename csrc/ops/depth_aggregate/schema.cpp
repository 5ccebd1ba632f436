#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "../common/checks.h"
#include "depth_aggregate.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("depth_aggregate(Tensor[] hiddens, Tensor weights) -> Tensor[]", tags);
  m.def("depth_aggregate_chained(Tensor[] hiddens, Tensor weights) -> (Tensor[], Tensor[])", tags);
  m.def(
      "depth_aggregate_chained.deferred(Tensor[] hiddens, Tensor weights, Tensor[] tickets, int "
      "deferred) -> (Tensor[], Tensor[])",
      tags);
  m.def(
      "depth_aggregate_backward(Tensor?[] grad_outputs, Tensor?[] grad_hiddens, Tensor[] hiddens, "
      "Tensor weights, int deferred=0) -> (Tensor[], Tensor)",
      tags);
}

std::vector<at::Tensor> depth_aggregate(at::TensorList hiddens, const at::Tensor& weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregate", "")
                             .typed<decltype(depth_aggregate)>();
  return op.call(hiddens, weights);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_chained(
    at::TensorList hiddens, const at::Tensor& weights, const Deferral& deferral) {
  using Results = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregate_chained", "")
                             .typed<Results(at::TensorList, const at::Tensor&)>();
  if (deferral.tickets.empty()) return op.call(hiddens, weights);
  static const auto deferred_op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("muddformer::depth_aggregate_chained", "deferred")
          .typed<Results(at::TensorList, const at::Tensor&, at::TensorList, int64_t)>();
  return deferred_op.call(hiddens, weights, deferral.tickets, deferral.count);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward(
    const c10::List<std::optional<at::Tensor>>& grad_outputs,
    const c10::List<std::optional<at::Tensor>>& grad_hiddens, at::TensorList hiddens,
    const at::Tensor& weights, int64_t deferred) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregate_backward", "")
                             .typed<decltype(depth_aggregate_backward)>();
  return op.call(grad_outputs, grad_hiddens, hiddens, weights, deferred);
}

void check_hiddens(at::TensorList hiddens) {
  TORCH_CHECK_VALUE(!hiddens.empty(), "hiddens: expected at least one hidden state, got none");
  const at::Tensor& first = hiddens[0];
  check_floating(first, {"hiddens", 0});
  TORCH_CHECK_VALUE(first.dim() >= 1, "hiddens[0]: expected shape [..., D], got a scalar");
  for (size_t j = 1; j < hiddens.size(); ++j) {
    const at::Tensor& x = hiddens[j];
    check_same_dtype_device(x, {"hiddens", static_cast<int64_t>(j)}, first, "hiddens[0]");
    TORCH_CHECK_VALUE(x.sym_sizes() == first.sym_sizes(), "hiddens[", j, "]: expected shape ",
                      first.sym_sizes(), " of hiddens[0], got ", x.sym_sizes());
  }
}

void check_depth_aggregate(at::TensorList hiddens, const at::Tensor& weights) {
  check_hiddens(hiddens);
  const at::Tensor& first = hiddens[0];
  check_same_dtype_device(weights, {"weights"}, first, "hiddens[0]");
  const auto leading = first.sym_sizes().slice(0, first.dim() - 1);
  TORCH_CHECK_VALUE(
      weights.dim() == first.dim() + 1 && weights.sym_sizes().slice(0, leading.size()) == leading &&
          weights.sym_size(-1) == static_cast<int64_t>(hiddens.size()) && weights.sym_size(-2) >= 1,
      "weights: expected shape [..., C, S] with leading shape ", leading,
      ", C >= 1 and S = ", hiddens.size(), " (the number of hidden states), got ",
      weights.sym_sizes());
}

static void check_gradients(const c10::List<std::optional<at::Tensor>>& grads, const char* name,
                            const at::Tensor& like) {
  for (size_t i = 0; i < grads.size(); ++i) {
    const std::optional<at::Tensor> grad = grads.get(i);
    if (!grad.has_value() || !grad->defined()) continue;
    const ArgumentName argument{name, static_cast<int64_t>(i)};
    check_same_dtype_device(*grad, argument, like, "hiddens[0]");
    TORCH_CHECK_VALUE(grad->sym_sizes() == like.sym_sizes(), argument, ": expected shape ",
                      like.sym_sizes(), " of hiddens[0], got ", grad->sym_sizes());
  }
}

void check_depth_aggregate_backward(const c10::List<std::optional<at::Tensor>>& grad_outputs,
                                    const c10::List<std::optional<at::Tensor>>& grad_hiddens,
                                    at::TensorList hiddens, const at::Tensor& weights,
                                    int64_t deferred) {
  check_depth_aggregate(hiddens, weights);
  TORCH_CHECK_VALUE(deferred >= 0 && deferred <= static_cast<int64_t>(hiddens.size()),
                    "deferred: expected 0 to S = ", hiddens.size(), ", got ", deferred);
  TORCH_CHECK_VALUE(weights.sym_size(-2) == static_cast<int64_t>(grad_outputs.size()),
                    "grad_outputs: expected C = ", weights.sym_size(-2), " gradients, got ",
                    grad_outputs.size());
  TORCH_CHECK_VALUE(grad_hiddens.empty() || grad_hiddens.size() == hiddens.size(),
                    "grad_hiddens: expected none or S = ", hiddens.size(), " gradients, got ",
                    grad_hiddens.size());
  check_gradients(grad_outputs, "grad_outputs", hiddens[0]);
  check_gradients(grad_hiddens, "grad_hiddens", hiddens[0]);
}

void check_deferral(at::TensorList hiddens, const at::Tensor& weights, at::TensorList tickets,
                    int64_t deferred) {
  if (tickets.empty() && deferred == 0) return;
  check_depth_aggregate(hiddens, weights);
  const auto sources = static_cast<int64_t>(hiddens.size());
  TORCH_CHECK_VALUE(deferred >= 0 && deferred <= sources, "deferred: expected 0 to S = ", sources,
                    ", got ", deferred);
  const c10::SymInt ways = weights.sym_size(-2);
  TORCH_CHECK_VALUE(ways + 1 == static_cast<int64_t>(tickets.size()), "tickets: expected ",
                    ways + 1, " tensors, one a way and one for the weights, got ", tickets.size());
  for (size_t i = 0; i < tickets.size(); ++i) {
    const ArgumentName argument{"tickets", static_cast<int64_t>(i)};
    check_same_dtype_device(tickets[i], argument, hiddens[0], "hiddens[0]");
    const auto shape = i + 1 < tickets.size() ? hiddens[0].sym_sizes() : weights.sym_sizes();
    TORCH_CHECK_VALUE(tickets[i].sym_sizes() == shape, argument, ": expected shape ", shape,
                      ", got ", tickets[i].sym_sizes());
  }
}

}  // namespace muddformer
