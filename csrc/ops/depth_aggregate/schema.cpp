#include <torch/library.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/rows.h"
#include "depth_aggregate.h"
#include "internal.h"

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
  detail::check_defined(weights, {"weights"});
  static const detail::Operator<decltype(depth_aggregate)> op("depth_aggregate");
  return op(hiddens, weights);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_chained(
    at::TensorList hiddens, const at::Tensor& weights, const Deferral& deferral) {
  detail::check_defined(weights, {"weights"});
  using Results = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
  if (deferral.tickets.empty() && deferral.count == 0) {
    static const detail::Operator<Results(at::TensorList, const at::Tensor&)> op(
        "depth_aggregate_chained");
    return op(hiddens, weights);
  }
  static const detail::Operator<Results(at::TensorList, const at::Tensor&, at::TensorList, int64_t)>
      op("depth_aggregate_chained", "deferred");
  return op(hiddens, weights, deferral.tickets, deferral.count);
}

namespace detail {

std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, int64_t deferred) {
  static const Operator<decltype(depth_aggregate_backward)> op("depth_aggregate_backward");
  return op(grad_outputs, grad_hiddens, hiddens, weights, deferred);
}

void check_hiddens(at::TensorList hiddens) {
  TORCH_CHECK_VALUE(!hiddens.empty(), "hiddens: expected at least one hidden state, got none");
  const at::Tensor& first = hiddens[0];
  check_floating(first, {"hiddens", 0});
  TORCH_CHECK_VALUE(first.dim() >= 1, "hiddens[0]: expected shape [..., D], got a scalar");
  for (size_t j = 1; j < hiddens.size(); ++j) {
    check_like(hiddens[j], {"hiddens", static_cast<int64_t>(j)}, first, "hiddens[0]");
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

static void check_gradients(const OptionalTensors& grads, const char* name,
                            const at::Tensor& like) {
  for (size_t i = 0; i < grads.size(); ++i) {
    if (const std::optional<at::Tensor> grad = entry(grads, i)) {
      check_like(*grad, {name, static_cast<int64_t>(i)}, like, "hiddens[0]");
    }
  }
}

void check_depth_aggregate_backward(const OptionalTensors& grad_outputs,
                                    const OptionalTensors& grad_hiddens, at::TensorList hiddens,
                                    const at::Tensor& weights, int64_t deferred) {
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

}  // namespace detail
}  // namespace muddformer
