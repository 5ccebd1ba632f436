// Autograd of the aggregation with normed streams: the sources are returned after the streams, as
// in depth_aggregate (the newest one normed, with a pre weight), and the streams themselves are
// what the backward knows the norms by.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/autograd_functions.h"
#include "../common/checks.h"
#include "../common/rows.h"
#include "../deferred_flush/internal.h"
#include "../depth_aggregate/internal.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The norms' tensors in one list, as autograd takes them, and what says which is which: one bit a
// way.
struct NormTensors {
  variable_list list;
  int64_t weights = 0, biases = 0;
  bool pre = false;

  explicit NormTensors(const StreamNorms& norms)
      : weights(add(norms.weights)), biases(add(norms.biases)), pre(norms.pre_weight.has_value()) {
    if (pre) list.push_back(*norms.pre_weight);
    if (norms.post_weight.has_value()) list.push_back(*norms.post_weight);
  }

 private:
  int64_t add(const OptionalTensors& tensors) {
    int64_t mask = 0;
    for (size_t c = 0; c < tensors.size(); ++c) {
      const std::optional<at::Tensor> tensor = entry(tensors, c);
      if (!tensor.has_value()) continue;
      mask |= int64_t{1} << c;
      list.push_back(*tensor);
    }
    return mask;
  }
};

void save(AutogradContext* ctx, const StreamNorms& norms, const NormTensors& tensors) {
  ctx->saved_data["weight_mask"] = tensors.weights;
  ctx->saved_data["bias_mask"] = tensors.biases;
  ctx->saved_data["pre"] = tensors.pre;
  ctx->saved_data["kind"] = norms.kind;
  ctx->saved_data["eps"] = norms.eps;
  ctx->saved_data["add_newest"] = norms.add_newest;
}

// What was saved, with the tensors of the list.
StreamNorms saved_norms(AutogradContext* ctx, at::TensorList list, int64_t ways) {
  StreamNorms norms{ctx->saved_data["kind"].toStringRef(), ctx->saved_data["eps"].toDouble()};
  norms.add_newest = ctx->saved_data["add_newest"].toBool();
  size_t at = 0;
  const auto next = [&](bool given) {
    return given ? std::optional<at::Tensor>(list[at++]) : std::nullopt;
  };
  const int64_t weights = ctx->saved_data["weight_mask"].toInt();
  const int64_t biases = ctx->saved_data["bias_mask"].toInt();
  for (int64_t c = 0; c < ways; ++c) norms.weights.push_back(next((weights >> c & 1) != 0));
  for (int64_t c = 0; c < ways; ++c) norms.biases.push_back(next((biases >> c & 1) != 0));
  norms.pre_weight = next(ctx->saved_data["pre"].toBool());
  norms.post_weight = next(at < list.size());
  return norms;
}

struct DepthAggregateNorm : torch::autograd::Function<DepthAggregateNorm> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static variable_list forward(AutogradContext* ctx, at::TensorList hiddens,
                               const at::Tensor& weights, at::TensorList norm_tensors,
                               const StreamNorms& norms, const NormTensors& tensors,
                               at::TensorList tickets, int64_t deferred) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [outputs, newest, mix, statistics] = depth_aggregate_norm_forward(hiddens, weights, norms);
    const auto ways = static_cast<int64_t>(outputs.size());
    const at::Tensor none = norms.post_weight ? at::empty({0}, weights.options()) : mix;
    variable_list saved(hiddens.begin(), hiddens.end());
    saved.push_back(weights);
    for (int64_t c = 0; c < ways; ++c) {  // the backward knows the norms by their outputs
      saved.push_back((tensors.weights >> c & 1) != 0 ? outputs[c] : none);
    }
    saved.push_back(std::move(mix));
    saved.push_back(std::move(statistics));
    saved.insert(saved.end(), norm_tensors.begin(), norm_tensors.end());
    ctx->save_for_backward(std::move(saved));
    save(ctx, norms, tensors);
    ctx->saved_data["sources"] = static_cast<int64_t>(hiddens.size());
    ctx->saved_data["ways"] = ways;
    ctx->saved_data["tickets"] = static_cast<int64_t>(tickets.size());
    ctx->saved_data["deferred"] = deferred;
    ctx->set_materialize_grads(false);
    outputs.insert(outputs.end(), hiddens.begin() + deferred, hiddens.end());
    if (tensors.pre) outputs.back() = std::move(newest);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t sources = ctx->saved_data["sources"].toInt();
    const int64_t ways = ctx->saved_data["ways"].toInt();
    const int64_t deferred = ctx->saved_data["deferred"].toInt();
    const int64_t tickets = ctx->saved_data["tickets"].toInt();
    const at::TensorList list(saved);
    const at::Tensor& weights = list[sources];
    const at::TensorList norm_tensors = list.slice(sources + 1 + ways + 2);
    const at::TensorList grad_outputs = at::TensorList(grads).slice(0, ways);
    variable_list result(deferred);  // no gradients of deferred sources
    result.insert(result.end(), grads.begin() + ways, grads.end());
    constexpr size_t kNorms = 2, kDeferred = 1;  // arguments without gradients
    const size_t count = sources + 1 + norm_tensors.size() + kNorms + tickets + kDeferred;
    const StreamNorms norms = saved_norms(ctx, norm_tensors, ways);
    const bool any = std::any_of(grad_outputs.begin(), grad_outputs.end(),
                                 [](const at::Tensor& grad) { return grad.defined(); });
    if (!any && !(norms.pre_weight.has_value() && result.back().defined())) {
      result.resize(count);
      return result;
    }
    const PastAutogradInBackward guard(grads);
    auto [own, grad_weights, grad_norm_weights, grad_norm_biases, grad_pre_weight, grad_post_weight,
          grad_sums] =
        depth_aggregate_norm_backward(
            optional_tensors(grad_outputs), optional_tensors(result), list.slice(0, sources),
            weights, norms,
            {list.slice(sources + 1, ways), list[sources + 1 + ways], list[sources + 2 + ways]},
            deferred);
    result.resize(deferred);
    result.insert(result.end(), own.begin(), own.end());
    result.push_back(std::move(grad_weights));
    const auto append = [&](const std::vector<at::Tensor>& all, const OptionalTensors& given) {
      for (size_t c = 0; c < all.size(); ++c) {
        if (given.get(c).has_value()) result.push_back(all[c]);
      }
    };
    append(grad_norm_weights, norms.weights);
    append(grad_norm_biases, norms.biases);
    if (norms.pre_weight.has_value()) result.push_back(std::move(grad_pre_weight));
    if (norms.post_weight.has_value()) result.push_back(std::move(grad_post_weight));
    result.resize(count - tickets - kDeferred);
    if (tickets != 0 && any) {
      for (int64_t c = 0; c < ways; ++c) {
        result.push_back(has_norm(norms, c) ? grad_sums[c] : grad_outputs[c]);
      }
      result.push_back(weights);
    }
    result.resize(count);
    return result;
  }
};

using StreamsAndHiddens = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

// Composite: there is nothing to dispatch on but the forward inside.
StreamsAndHiddens deferred_composite(at::TensorList hiddens, const at::Tensor& weights,
                                     const StreamNorms& norms, at::TensorList tickets,
                                     int64_t deferred) {
  check_all_defined(hiddens, "hiddens");
  check_defined(weights, {"weights"});
  check_depth_aggregate_norm(hiddens, weights, norms);
  check_deferral(hiddens, weights, tickets, deferred);
  check_newest_kept(hiddens, norms, deferred);
  const NormTensors tensors(norms);
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (!at::GradMode::is_enabled() ||
      !(weights.requires_grad() || std::any_of(hiddens.begin(), hiddens.end(), requires_grad) ||
        std::any_of(tensors.list.begin(), tensors.list.end(), requires_grad))) {
    const PastAutograd guard(hiddens, weights, tensors.list);
    auto [streams, newest, mix, statistics] = depth_aggregate_norm_forward(hiddens, weights, norms);
    std::vector<at::Tensor> handed_on = hiddens.vec();
    if (norms.pre_weight.has_value()) handed_on.back() = std::move(newest);
    return {std::move(streams), std::move(handed_on)};
  }
  use_tickets(hiddens, tickets, deferred);
  variable_list streams =
      DepthAggregateNorm::apply(at::TensorList(without_edges(hiddens, deferred)), weights,
                                at::TensorList(tensors.list), norms, tensors, tickets, deferred);
  const auto young = static_cast<int64_t>(hiddens.size()) - deferred;
  std::vector<at::Tensor> handed_on = hiddens.vec();
  std::move(streams.end() - young, streams.end(), handed_on.begin() + deferred);
  streams.erase(streams.end() - young, streams.end());
  return {std::move(streams), std::move(handed_on)};
}

StreamsAndHiddens chained_composite(at::TensorList hiddens, const at::Tensor& weights,
                                    const StreamNorms& norms) {
  return deferred_composite(hiddens, weights, norms, {}, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating these raises an error that names the op.
  m.impl("depth_aggregate_norm_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("depth_aggregate_norm_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("depth_aggregate_norm_chained", flat<chained_composite>);
  m.impl("depth_aggregate_norm_chained.deferred", flat<deferred_composite>);
}

}  // namespace muddformer::detail
