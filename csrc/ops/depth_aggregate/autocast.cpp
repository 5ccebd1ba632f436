// Under autocast the history is kept in the autocast dtype. The chained form hands the cast sources
// on, so that a hidden state is cast once, when it joins, and not in every layer.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "depth_aggregate.h"

namespace muddformer {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::vector<at::Tensor> depth_aggregate_autocast(at::TensorList hiddens,
                                                 const at::Tensor& weights) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return depth_aggregate(at::autocast::cached_cast(dtype, hiddens, device),
                         at::autocast::cached_cast(dtype, weights, device));
}

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_deferred_autocast(
    at::TensorList hiddens, const at::Tensor& weights, at::TensorList tickets, int64_t deferred) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return depth_aggregate_chained(at::autocast::cached_cast(dtype, hiddens, device),
                                 at::autocast::cached_cast(dtype, weights, device),
                                 {tickets.vec(), deferred});
}

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_chained_autocast(
    at::TensorList hiddens, const at::Tensor& weights) {
  return depth_aggregate_deferred_autocast<key, device>(hiddens, weights, {}, 0);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, AutocastCPU, m) {
  m.impl("depth_aggregate", depth_aggregate_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("depth_aggregate_chained",
         depth_aggregate_chained_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
  m.impl("depth_aggregate_chained.deferred",
         depth_aggregate_deferred_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(muddformer, AutocastCUDA, m) {
  m.impl("depth_aggregate", depth_aggregate_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("depth_aggregate_chained",
         depth_aggregate_chained_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
  m.impl("depth_aggregate_chained.deferred",
         depth_aggregate_deferred_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace muddformer
