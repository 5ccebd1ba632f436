// depth_aggregation_step out of the operators that it joins.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../connection_weights/connection_weights.h"
#include "../depth_aggregate/depth_aggregate.h"
#include "internal.h"

namespace muddformer::detail {

inline std::vector<at::Tensor> depth_aggregation_step_composition(
    at::TensorList hiddens, const std::optional<at::Tensor>& w1,
    const std::optional<at::Tensor>& w2, const at::Tensor& prior, const GeneratorOptions& options,
    const StepNorms& norms) {
  check_depth_aggregation_step(hiddens, w1, w2, prior, options, norms);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor& x = hiddens.back();
  const at::ScalarType dtype = x.scalar_type();
  at::Tensor weights;
  if (w1.has_value()) {
    weights = connection_weights(x, *w1, *w2, prior, options);
  } else {
    at::Tensor a = prior.to(accumulation_dtype(dtype));
    if (options.cap.has_value()) a = at::div(a, *options.cap).tanh_().mul_(*options.cap);
    at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
    shape.append(prior.sizes().begin(), prior.sizes().end());
    weights = a.to(dtype).expand(shape);
  }
  std::vector<at::Tensor> streams = depth_aggregate(hiddens, weights);
  for (size_t c = 0; c < streams.size(); ++c) {
    std::optional<at::Tensor> weight = entry(norms.weights, c), bias = entry(norms.biases, c);
    if (!weight.has_value()) continue;
    weight = weight->to(dtype);
    if (norms.kind == "layer") {
      if (bias.has_value()) bias = bias->to(dtype);
      streams[c] = at::layer_norm(streams[c], weight->sizes(), weight, bias, norms.eps);
    } else {
      streams[c] = at::rms_norm(streams[c], weight->sizes(), weight, norms.eps);
    }
  }
  return streams;
}

}  // namespace muddformer::detail
