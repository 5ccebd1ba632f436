// Autograd of deferred gradients. A group's layers hand what they defer to the node that opened the
// group, as the gradients of its tickets: expanded scalars of the shapes that these gradients have.
// Nothing but autograd's own edges is used, so hooks, retain_graph, checkpointing and tracing see
// an ordinary graph of functional operators.
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

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
    ctx->saved_data["hiddens"] = static_cast<int64_t>(hiddens.size());
    ctx->set_materialize_grads(false);
    const at::Tensor& like = hiddens[0];
    const at::Tensor zero = at::zeros({}, like.options());
    c10::SymDimVector shape(like.sym_sizes().begin(), like.sym_sizes().end() - 1);
    variable_list outputs(hiddens.begin(), hiddens.end());
    for (size_t i = 0; i < ways.size(); ++i) {
      for (int64_t c = 0; c < ways[i]; ++c) {
        outputs.push_back(zero.expand_symint(like.sym_sizes()));
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

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating the flush raises an error that names the op.
  m.impl("deferred_flush", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("defer_gradients", defer_gradients_composite);
}

}  // namespace muddformer::detail
