// depth_aggregate_norm_forward and its backward out of the aggregation and PyTorch's elementwise
// steps: what the CPU runs, and CUDA where the fused kernels cannot. The backward makes the sums
// again.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../depth_aggregate/depth_aggregate.h"
#include "../depth_aggregate/internal.h"
#include "internal.h"

namespace muddformer::detail {

// What a way does after the sum over the sources.
struct NormOfWay {
  at::Tensor weight;  // undefined: no norm
  at::Tensor bias;    // undefined: none
  bool layer = false;
  bool post = false;  // the norm comes before base is added
};

// The sources as they are mixed, and what the norm of the newest knows.
struct MixedSources {
  std::vector<at::Tensor> hiddens;
  at::Tensor newest;     // normed, if there is a pre weight; [0] otherwise
  at::Tensor normed, r;  // before the weight, and its factor, in the type of the sums
};

inline MixedSources mixed_sources(at::TensorList hiddens, const StreamNorms& norms) {
  const at::Tensor& x = hiddens.back();
  MixedSources result{hiddens.vec(), at::empty({0}, x.options()), {}, {}};
  if (!norms.pre_weight.has_value()) return result;
  const at::ScalarType wide = accumulation_dtype(x.scalar_type());
  const at::Tensor v = x.to(wide);
  result.r = v.square().mean(-1, /*keepdim=*/true).add_(norms.eps).rsqrt_();
  result.normed = v * result.r;
  result.newest = (result.normed * norms.pre_weight->to(wide)).to(x.scalar_type()).contiguous();
  result.hiddens.back() = result.newest;
  return result;
}

inline NormOfWay norm_of_way(int64_t c, const StreamNorms& norms) {
  if (norms.post_weight.has_value() && c + 1 == static_cast<int64_t>(norms.weights.size())) {
    return {*norms.post_weight, {}, false, true};
  }
  const at::Tensor none;
  return {entry(norms.weights, c).value_or(none), entry(norms.biases, c).value_or(none),
          norms.kind == "layer", false};
}

inline NormedStreams depth_aggregate_norm_forward_composition(at::TensorList hiddens,
                                                              const at::Tensor& weights,
                                                              const StreamNorms& norms) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor& like = hiddens[0];
  const at::ScalarType wide = accumulation_dtype(like.scalar_type());
  const MixedSources sources = mixed_sources(hiddens, norms);
  std::vector<at::Tensor> outputs = depth_aggregate(sources.hiddens, weights);
  const int64_t ways = static_cast<int64_t>(outputs.size());
  at::Tensor mix = at::empty({0}, like.options());
  std::vector<at::Tensor> means, factors;
  at::DimVector leading(like.sizes().begin(), like.sizes().end() - 1);
  leading.push_back(1);
  for (int64_t c = 0; c < ways; ++c) {
    const NormOfWay way = norm_of_way(c, norms);
    means.push_back(at::zeros(leading, like.options().dtype(wide)));
    factors.push_back(at::ones(leading, like.options().dtype(wide)));
    if (way.post) mix = outputs[c];
    at::Tensor v = outputs[c].to(wide);
    if (norms.add_newest && !way.post) v = v + hiddens.back();
    if (way.weight.defined()) {
      if (way.layer) means[c] = v.mean(-1, /*keepdim=*/true);
      const at::Tensor centred = v - means[c];
      factors[c] = centred.square().mean(-1, /*keepdim=*/true).add_(norms.eps).rsqrt_();
      v = centred * factors[c] * way.weight.to(wide);
      if (way.bias.defined()) v = v + way.bias.to(wide);
    }
    if (way.post) v = v + hiddens.back();
    outputs[c] = v.to(like.scalar_type());
  }
  if (norms.pre_weight.has_value()) {
    means.push_back(at::zeros_like(sources.r));
    factors.push_back(sources.r);
  }
  const int64_t rows = static_cast<int64_t>(means.size()), tokens = means[0].numel();
  means.insert(means.end(), factors.begin(), factors.end());
  return {std::move(outputs), sources.newest, std::move(mix),
          at::stack(means).view({2, rows, tokens})};
}

inline NormsGradients depth_aggregate_norm_backward_composition(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, const StreamNorms& norms,
    const at::Tensor& statistics, int64_t deferred) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor& like = hiddens[0];
  const at::ScalarType dtype = like.scalar_type(), wide = accumulation_dtype(dtype);
  const int64_t ways = static_cast<int64_t>(norms.weights.size()), width = like.size(-1);
  const MixedSources sources = mixed_sources(hiddens, norms);
  bool any_norm = false;
  for (int64_t c = 0; c < ways; ++c) any_norm |= has_norm(norms, c);
  std::vector<at::Tensor> sums;
  if (any_norm) sums = depth_aggregate(sources.hiddens, weights);
  at::DimVector column(like.sizes().begin(), like.sizes().end() - 1);
  column.push_back(1);
  const auto rows_sum = [&](const at::Tensor& tensor, const at::Tensor& parameter) {
    return tensor.reshape({-1, width}).sum(0).to(parameter.scalar_type());
  };
  // The gradient of what was normed to n, from g, that of n.
  const auto through_norm = [](const at::Tensor& g, const at::Tensor& n, const at::Tensor& factor,
                               bool layer) {
    const at::Tensor grad = g - n * (g * n).mean(-1, /*keepdim=*/true);
    return (layer ? grad - g.mean(-1, /*keepdim=*/true) : grad) * factor;
  };
  const auto none = [&] { return at::empty({0}, like.options()); };  // outputs share no memory
  std::vector<at::Tensor> grad_norm_weights, grad_norm_biases;
  at::Tensor grad_pre_weight = none(), grad_post_weight = none();
  at::Tensor grad_base;
  if (norms.add_newest) grad_base = at::zeros(like.sizes(), like.options().dtype(wide));
  OptionalTensors grad_sums;
  std::vector<at::Tensor> left;  // for the flush of the deferred gradients
  for (int64_t c = 0; c < ways; ++c) {
    const NormOfWay way = norm_of_way(c, norms);
    const std::optional<at::Tensor> given = entry(grad_outputs, c);
    const at::Tensor dy =
        given ? given->to(wide) : at::zeros(like.sizes(), like.options().dtype(wide));
    at::Tensor dv = dy;
    if (way.weight.defined()) {
      const at::Tensor mean = statistics[0][c].view(column), factor = statistics[1][c].view(column);
      at::Tensor v = sums[c].to(wide);
      if (norms.add_newest && !way.post) v = v + hiddens.back();
      const at::Tensor n = (v - mean) * factor;
      dv = through_norm(dy * way.weight.to(wide), n, factor, way.layer);
      if (way.post) grad_post_weight = rows_sum(dy * n, way.weight);
      grad_norm_weights.push_back(way.post ? none() : rows_sum(dy * n, way.weight));
    } else {
      grad_norm_weights.push_back(none());
    }
    grad_norm_biases.push_back(way.bias.defined() ? rows_sum(dy, way.bias) : none());
    if (norms.add_newest) grad_base.add_(way.post ? dy : dv);
    grad_sums.push_back(dv.to(dtype));
    left.push_back(deferred > 0 && way.weight.defined() ? grad_sums.get(c)->contiguous() : none());
  }
  auto [grads, grad_weights] =
      depth_aggregate_backward(grad_sums, grad_hiddens, sources.hiddens, weights, deferred);
  if (norms.add_newest || norms.pre_weight.has_value()) {
    at::Tensor grad = grads.back().to(wide);
    if (norms.pre_weight.has_value()) {
      grad_pre_weight = rows_sum(grad * sources.normed, *norms.pre_weight);
      grad = through_norm(grad * norms.pre_weight->to(wide), sources.normed, sources.r, false);
    }
    grads.back() = (norms.add_newest ? grad + grad_base : grad).to(dtype);
  }
  return {std::move(grads),
          std::move(grad_weights),
          std::move(grad_norm_weights),
          std::move(grad_norm_biases),
          std::move(grad_pre_weight),
          std::move(grad_post_weight),
          std::move(left)};
}

}  // namespace muddformer::detail
