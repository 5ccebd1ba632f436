// Under autocast the hidden states, W1 and W2 take the autocast dtype; the small parameters are
// read in float32.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "depth_aggregation_step.h"

namespace muddformer {
namespace {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

template <c10::DispatchKey key, c10::DeviceType device>
std::vector<at::Tensor> depth_aggregation_step_autocast(
    at::TensorList hiddens, const std::optional<at::Tensor>& w1,
    const std::optional<at::Tensor>& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
    std::optional<double> cap, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double norm_eps) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [](const std::optional<at::Tensor>& tensor, at::ScalarType to) {
    return tensor.has_value() && tensor->defined()
               ? std::optional<at::Tensor>(at::autocast::cached_cast(to, *tensor, device))
               : std::nullopt;
  };
  const auto cast_all = [&](const OptionalTensors& list) {
    OptionalTensors result;
    result.reserve(list.size());
    for (size_t i = 0; i < list.size(); ++i) result.push_back(cast(list.get(i), at::kFloat));
    return result;
  };
  return depth_aggregation_step(
      at::autocast::cached_cast(dtype, hiddens, device), cast(w1, dtype), cast(w2, dtype),
      at::autocast::cached_cast(at::kFloat, prior, device), cast(scale, at::kFloat), eps,
      gelu_approximate, cap, cast_all(norm_weights), cast_all(norm_biases), norm, norm_eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, AutocastCPU, m) {
  m.impl("depth_aggregation_step",
         depth_aggregation_step_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(muddformer, AutocastCUDA, m) {
  m.impl("depth_aggregation_step",
         depth_aggregation_step_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace muddformer
