// Autograd of the aggregation with normed streams: the sources are returned after the streams, as
// in depth_aggregate (the newest one normed, with a pre weight), and the streams themselves are
// what the backward knows the norms by.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/checks.h"
#include "../common/rows.h"
#include "depth_aggregate_norm.h"

namespace muddformer {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The norms' tensors as one list, and what says which way each belongs to: one bit a way.
struct NormTensors {
  OptionalTensors weights;
  OptionalTensors biases;
  std::optional<at::Tensor> pre_weight;
  std::optional<at::Tensor> post_weight;

  // The inverse of flatten().
  NormTensors(at::TensorList list, int64_t ways, int64_t weight_mask, int64_t bias_mask,
              bool has_pre) {
    size_t at = 0;
    const auto next = [&](bool given) {
      return given ? std::optional<at::Tensor>(list[at++]) : std::nullopt;
    };
    for (int64_t c = 0; c < ways; ++c) weights.push_back(next((weight_mask >> c & 1) != 0));
    for (int64_t c = 0; c < ways; ++c) biases.push_back(next((bias_mask >> c & 1) != 0));
    pre_weight = next(has_pre);
    post_weight = next(at < list.size());
  }
};

int64_t flatten(const OptionalTensors& tensors, variable_list& to) {
  int64_t mask = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<at::Tensor> tensor = tensors.get(i);
    if (!tensor.has_value() || !tensor->defined()) continue;
    mask |= int64_t{1} << i;
    to.push_back(*tensor);
  }
  return mask;
}

struct DepthAggregateNorm : torch::autograd::Function<DepthAggregateNorm> {
  static constexpr bool is_traceable = true;  // for compiled autograd: no state but saved tensors

  static variable_list forward(AutogradContext* ctx, at::TensorList hiddens,
                               const at::Tensor& weights, at::TensorList norm_tensors,
                               int64_t weight_mask, int64_t bias_mask, bool has_pre,
                               std::string_view norm, double eps, bool add_newest,
                               at::TensorList tickets, int64_t deferred) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const int64_t ways = weights.sym_size(-2).guard_int(__FILE__, __LINE__);
    const NormTensors norms(norm_tensors, ways, weight_mask, bias_mask, has_pre);
    auto [outputs, newest, mix, statistics] =
        depth_aggregate_norm_forward(hiddens, weights, norms.weights, norms.biases, norm, eps,
                                     add_newest, norms.pre_weight, norms.post_weight);
    variable_list saved(hiddens.begin(), hiddens.end());
    saved.push_back(weights);
    for (int64_t c = 0; c < ways; ++c) {  // the backward knows the norms by their outputs
      const bool normed = (weight_mask >> c & 1) != 0;
      saved.push_back(normed ? outputs[c] : at::empty({0}, weights.options()));
    }
    saved.push_back(std::move(mix));
    saved.push_back(std::move(statistics));
    saved.insert(saved.end(), norm_tensors.begin(), norm_tensors.end());
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["sources"] = static_cast<int64_t>(hiddens.size());
    ctx->saved_data["ways"] = ways;
    ctx->saved_data["weight_mask"] = weight_mask;
    ctx->saved_data["bias_mask"] = bias_mask;
    ctx->saved_data["has_pre"] = has_pre;
    ctx->saved_data["norm"] = std::string(norm);
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["add_newest"] = add_newest;
    ctx->saved_data["tickets"] = static_cast<int64_t>(tickets.size());
    ctx->saved_data["deferred"] = deferred;
    ctx->set_materialize_grads(false);
    outputs.insert(outputs.end(), hiddens.begin() + deferred, hiddens.end());
    if (has_pre) outputs.back() = std::move(newest);
    return outputs;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const int64_t sources = ctx->saved_data["sources"].toInt();
    const int64_t ways = ctx->saved_data["ways"].toInt();
    const at::TensorList list(saved);
    const at::TensorList hiddens = list.slice(0, sources);
    const at::TensorList outputs = list.slice(sources + 1, ways);
    const at::TensorList norm_tensors = list.slice(sources + 1 + ways + 2);
    const at::TensorList grad_outputs = at::TensorList(grads).slice(0, ways);
    const int64_t deferred = ctx->saved_data["deferred"].toInt();
    const int64_t tickets = ctx->saved_data["tickets"].toInt();
    variable_list result(deferred);  // no gradients of deferred sources
    result.insert(result.end(), grads.begin() + ways, grads.end());
    constexpr size_t kOtherArguments = 7;
    const size_t count = sources + 1 + norm_tensors.size() + tickets + kOtherArguments;
    const bool has_pre = ctx->saved_data["has_pre"].toBool();
    const bool any = std::any_of(grad_outputs.begin(), grad_outputs.end(),
                                 [](const at::Tensor& grad) { return grad.defined(); });
    if (!any && !(has_pre && result.back().defined())) {
      result.resize(count);
      return result;
    }
    const NormTensors norms(norm_tensors, ways, ctx->saved_data["weight_mask"].toInt(),
                            ctx->saved_data["bias_mask"].toInt(), has_pre);
    auto [own, grad_weights, grad_norm_weights, grad_norm_biases, grad_pre_weight, grad_post_weight,
          grad_sums] =
        depth_aggregate_norm_backward(
            optional_tensors(grad_outputs), optional_tensors(result), hiddens, list[sources],
            norms.weights, norms.biases, ctx->saved_data["norm"].toStringRef(),
            ctx->saved_data["eps"].toDouble(), ctx->saved_data["add_newest"].toBool(),
            norms.pre_weight, norms.post_weight, outputs, list[sources + 1 + ways],
            list[sources + 2 + ways], deferred);
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
    result.resize(count - tickets - 1);  // no gradients of the other arguments
    if (tickets != 0 && any) {
      for (int64_t c = 0; c < ways; ++c) {
        const bool normed = has_norm(norms.weights, norms.post_weight, c);
        result.push_back(normed ? grad_sums[c] : grad_outputs[c]);
      }
      result.push_back(list[sources]);
    }
    result.resize(count);
    return result;
  }
};

// Composite: there is nothing to dispatch on but the forward inside.
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>
depth_aggregate_norm_deferred_composite(at::TensorList hiddens, const at::Tensor& weights,
                                        const OptionalTensors& norm_weights,
                                        const OptionalTensors& norm_biases, std::string_view norm,
                                        double eps, bool add_newest,
                                        const std::optional<at::Tensor>& pre_weight,
                                        const std::optional<at::Tensor>& post_weight,
                                        at::TensorList tickets, int64_t deferred) {
  for (size_t j = 0; j < hiddens.size(); ++j) {
    check_defined(hiddens[j], {"hiddens", static_cast<int64_t>(j)});
  }
  check_defined(weights, {"weights"});
  check_depth_aggregate_norm(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest,
                             pre_weight, post_weight);
  check_deferral(hiddens, weights, tickets, deferred);
  check_newest_kept(hiddens, add_newest, pre_weight, deferred);
  variable_list norm_tensors;
  const int64_t weight_mask = flatten(norm_weights, norm_tensors);
  const int64_t bias_mask = flatten(norm_biases, norm_tensors);
  if (pre_weight.has_value()) norm_tensors.push_back(*pre_weight);
  if (post_weight.has_value()) norm_tensors.push_back(*post_weight);
  const auto requires_grad = [](const at::Tensor& tensor) { return tensor.requires_grad(); };
  if (!at::GradMode::is_enabled() ||
      !(weights.requires_grad() || std::any_of(hiddens.begin(), hiddens.end(), requires_grad) ||
        std::any_of(norm_tensors.begin(), norm_tensors.end(), requires_grad))) {
    auto [streams, newest, mix, statistics] =
        depth_aggregate_norm_forward(hiddens, weights, norm_weights, norm_biases, norm, eps,
                                     add_newest, pre_weight, post_weight);
    std::vector<at::Tensor> handed_on = hiddens.vec();
    if (pre_weight.has_value()) handed_on.back() = std::move(newest);
    return {std::move(streams), std::move(handed_on)};
  }
  variable_list streams = DepthAggregateNorm::apply(
      at::TensorList(without_edges(hiddens, deferred)), weights, at::TensorList(norm_tensors),
      weight_mask, bias_mask, pre_weight.has_value(), norm, eps, add_newest, tickets, deferred);
  const auto young = static_cast<int64_t>(hiddens.size()) - deferred;
  std::vector<at::Tensor> handed_on = hiddens.vec();
  std::move(streams.end() - young, streams.end(), handed_on.begin() + deferred);
  streams.erase(streams.end() - young, streams.end());
  return {std::move(streams), std::move(handed_on)};
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_norm_chained_composite(
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight) {
  return depth_aggregate_norm_deferred_composite(hiddens, weights, norm_weights, norm_biases, norm,
                                                 eps, add_newest, pre_weight, post_weight, {}, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  // Differentiating these raises an error that names the op.
  m.impl("depth_aggregate_norm_forward", torch::autograd::autogradNotImplementedFallback());
  m.impl("depth_aggregate_norm_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("depth_aggregate_norm_chained", depth_aggregate_norm_chained_composite);
  m.impl("depth_aggregate_norm_chained.deferred", depth_aggregate_norm_deferred_composite);
}

}  // namespace muddformer
