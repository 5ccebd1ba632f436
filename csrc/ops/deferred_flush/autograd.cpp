// Autograd of deferred gradients. A group's layers hand what they defer to the node that opened the
// group, as the gradients of its tickets: expanded scalars of the shapes that these gradients have.
// Nothing but autograd's own edges is used, so hooks, retain_graph, checkpointing and tracing see
// an ordinary graph of functional operators.
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/autograd_functions.h"
#include "../common/checks.h"
#include "../common/rows.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct DeferGradients : torch::autograd::Function<DeferGradients> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but sizes

  static variable_list forward(AutogradContext* ctx, at::TensorList hiddens,
                               const std::vector<int64_t>& ways,
                               const std::vector<int64_t>& sources) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->saved_data["ways"] = ways;
    ctx->saved_data["used"] = std::vector<int64_t>(ways.size());
    ctx->saved_data["hiddens"] = static_cast<int64_t>(hiddens.size());
    ctx->set_materialize_grads(false);
    const at::Tensor& like = hiddens[0];
    const at::Tensor zero = at::zeros({}, like.options());
    c10::SymDimVector shape(like.sym_sizes().begin(), like.sym_sizes().end() - 1);
    variable_list outputs = hiddens.vec();
    const at::Tensor ticket = zero.expand_symint(like.sym_sizes());
    const bool aliases = only_autograd_watches() && is_ordinary(ticket);
    for (size_t i = 0; i < ways.size(); ++i) {
      for (int64_t c = 0; c < ways[i]; ++c) {
        outputs.push_back(aliases ? alias_of(ticket) : zero.expand_symint(like.sym_sizes()));
      }
      shape.push_back(ways[i]);
      shape.push_back(sources[i]);
      outputs.push_back(zero.expand_symint(shape));
      shape.resize(shape.size() - 2);
    }
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto ways = ctx->saved_data["ways"].toIntVector();
    const int64_t count = ctx->saved_data["hiddens"].toInt();
    OptionalTensors grad_sums;
    variable_list weights;
    auto next = grads.begin() + count;
    for (const int64_t layer : ways) {  // one whose streams had no gradients has no weights here
      const auto end = next + layer;
      if (end->defined()) {
        weights.push_back(*end);
        for (; next != end; ++next) {
          grad_sums.push_back(next->defined() ? std::optional<at::Tensor>(*next) : std::nullopt);
        }
      }
      next = end + 1;
    }
    variable_list result(grads.begin(), grads.begin() + count);
    const PastAutogradInBackward guard(grads);
    if (!weights.empty()) result = deferred_flush(optional_tensors(result), grad_sums, weights);
    result.resize(count + 2);
    return result;
  }
};

// Composite: there is nothing to dispatch on.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> defer_gradients_composite(
    at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources) {
  check_defer_gradients(hiddens, ways, sources);
  variable_list handed_on = DeferGradients::apply(hiddens, ways.vec(), sources.vec());
  const auto first_ticket = handed_on.begin() + static_cast<int64_t>(hiddens.size());
  std::vector<at::Tensor> tickets(first_ticket, handed_on.end());
  handed_on.erase(first_ticket, handed_on.end());
  return {std::move(handed_on), std::move(tickets)};
}

}  // namespace

void use_tickets(at::TensorList hiddens, at::TensorList tickets, int64_t deferred) {
  if (tickets.empty() || torch::autograd::get_current_graph_task_id() != -1) return;
  // What a group hands on requires gradients if any of its hidden states does.
  const auto check_gradients = [&](const torch::autograd::Node* group) {
    const auto carries = [group](const at::Tensor& hidden, int64_t j) {
      return group != nullptr &&
             (group->next_edge(j).is_valid() || hidden.grad_fn().get() == group);
    };
    for (int64_t j = 0; j < deferred; ++j) {
      TORCH_CHECK_VALUE(
          !hiddens[j].requires_grad() || carries(hiddens[j], j),
          "tickets: expected those of a group of hidden states that require gradients, as ",
          ArgumentName{"hiddens", j}, " does, got tickets without gradients");
    }
  };
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (std::none_of(tickets.begin(), tickets.end(), requires_grad)) return check_gradients(nullptr);
  const auto node = tickets[0].grad_fn();
  auto* group = dynamic_cast<torch::autograd::CppNode<DeferGradients>*>(node.get());
  if (group == nullptr) return;
  auto& data = group->ctx_.saved_data;
  const int64_t older = data["hiddens"].toInt();
  TORCH_CHECK_VALUE(deferred == older, "deferred: expected ", older,
                    " of the group that the tickets are of, got ", deferred);
  check_gradients(group);
  const auto count = static_cast<int64_t>(tickets.size());
  const int64_t first = tickets[0].output_nr();
  for (int64_t i = 1; i < count; ++i) {
    TORCH_CHECK_VALUE(tickets[i].grad_fn() == node && tickets[i].output_nr() == first + i,
                      ArgumentName{"tickets", i},
                      ": expected a ticket of the layer of tickets[0], "
                      "in its order, got another one");
  }
  const auto ways = data["ways"].toIntVector();
  size_t layer = 0;
  int64_t begin = older;
  while (layer + 1 < ways.size() && begin < first) begin += ways[layer++] + 1;
  TORCH_CHECK_VALUE(begin == first && ways[layer] + 1 == count,
                    "tickets: expected all tickets of one layer, got those of parts of layers");
  auto used = data["used"].toIntVector();
  TORCH_CHECK(used[layer] == 0,
              "deferral: expected one that no layer was called with before, got "
              "that of layer ",
              layer, " of its group a second time");
  used[layer] = 1;
  data["used"] = std::move(used);
}

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating the flush raises an error that names the op.
  m.impl("deferred_flush", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("defer_gradients", defer_gradients_composite);
}

}  // namespace muddformer::detail
