// depth_aggregation_step out of the operators that it joins.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "../common/checks.h"
#include "../connection_weights/connection_weights.h"
#include "../depth_aggregate/depth_aggregate.h"
#include "depth_aggregation_step.h"

namespace muddformer {

// Defined in schema.cpp.
void check_depth_aggregation_step(at::TensorList hiddens, const std::optional<at::Tensor>& w1,
                                  const std::optional<at::Tensor>& w2, const at::Tensor& prior,
                                  const std::optional<at::Tensor>& scale, double eps,
                                  std::string_view gelu_approximate, std::optional<double> cap,
                                  const c10::List<std::optional<at::Tensor>>& norm_weights,
                                  const c10::List<std::optional<at::Tensor>>& norm_biases,
                                  std::string_view norm, double norm_eps);

// An entry of a list that may be empty, in place of a list of nothing.
inline std::optional<at::Tensor> entry(const c10::List<std::optional<at::Tensor>>& list,
                                       int64_t i) {
  return i < static_cast<int64_t>(list.size()) ? list.get(i) : std::optional<at::Tensor>();
}

inline std::vector<at::Tensor> depth_aggregation_step_composition(
    at::TensorList hiddens, const std::optional<at::Tensor>& w1,
    const std::optional<at::Tensor>& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
    std::optional<double> cap, const c10::List<std::optional<at::Tensor>>& norm_weights,
    const c10::List<std::optional<at::Tensor>>& norm_biases, std::string_view norm,
    double norm_eps) {
  check_depth_aggregation_step(hiddens, w1, w2, prior, scale, eps, gelu_approximate, cap,
                               norm_weights, norm_biases, norm, norm_eps);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor& x = hiddens.back();
  const at::ScalarType dtype = x.scalar_type();
  at::Tensor weights;
  if (w1.has_value()) {
    weights = connection_weights(x, *w1, *w2, prior, scale, eps, gelu_approximate, cap);
  } else {
    at::Tensor a = prior.to(accumulation_dtype(dtype));
    if (cap.has_value()) a = at::div(a, *cap).tanh_().mul_(*cap);
    at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
    shape.append(prior.sizes().begin(), prior.sizes().end());
    weights = a.to(dtype).expand(shape);
  }
  std::vector<at::Tensor> streams = depth_aggregate(hiddens, weights);
  for (size_t c = 0; c < streams.size(); ++c) {
    std::optional<at::Tensor> weight = entry(norm_weights, c), bias = entry(norm_biases, c);
    if (!weight.has_value()) continue;
    weight = weight->to(dtype);
    if (norm == "layer") {
      if (bias.has_value()) bias = bias->to(dtype);
      streams[c] = at::layer_norm(streams[c], weight->sizes(), weight, bias, norm_eps);
    } else {
      streams[c] = at::rms_norm(streams[c], weight->sizes(), weight, norm_eps);
    }
  }
  return streams;
}

}  // namespace muddformer
