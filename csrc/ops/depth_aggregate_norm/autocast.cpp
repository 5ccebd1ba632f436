// Under autocast the history is kept in the autocast dtype, as by depth_aggregate_chained; the
// norms' parameters are read in float32.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "depth_aggregate_norm.h"

namespace muddformer {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_norm_deferred_autocast(
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight,
    at::TensorList tickets, int64_t deferred) {
  using at::autocast::cached_cast;
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  const auto cast = [](at::ScalarType to, const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->defined()
               ? std::optional<at::Tensor>(cached_cast(to, *tensor, device))
               : std::nullopt;
  };
  const auto cast_parameters = [&](const OptionalTensors& tensors) {
    OptionalTensors result;
    for (size_t i = 0; i < tensors.size(); ++i) result.push_back(cast(at::kFloat, tensors.get(i)));
    return result;
  };
  return depth_aggregate_norm_chained(
      cached_cast(dtype, hiddens, device), cached_cast(dtype, weights, device),
      cast_parameters(norm_weights), cast_parameters(norm_biases), norm, eps, add_newest,
      cast(at::kFloat, pre_weight), cast(at::kFloat, post_weight), {tickets.vec(), deferred});
}

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_norm_chained_autocast(
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight) {
  return depth_aggregate_norm_deferred_autocast<key, device>(hiddens, weights, norm_weights,
                                                             norm_biases, norm, eps, add_newest,
                                                             pre_weight, post_weight, {}, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, AutocastCPU, m) {
  m.impl("depth_aggregate_norm_chained",
         depth_aggregate_norm_chained_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("depth_aggregate_norm_chained.deferred",
         depth_aggregate_norm_deferred_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(muddformer, AutocastCUDA, m) {
  m.impl("depth_aggregate_norm_chained",
         depth_aggregate_norm_chained_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("depth_aggregate_norm_chained.deferred",
         depth_aggregate_norm_deferred_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace muddformer
