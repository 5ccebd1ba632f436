// Under autocast the history is kept in the autocast dtype, see depth_aggregate.
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "deferred_flush.h"

namespace muddformer {
namespace {

template <c10::DispatchKey key, c10::DeviceType device>
std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> defer_gradients_autocast(
    at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::defer_gradients", "")
                             .typed<decltype(defer_gradients_autocast<key, device>)>();
  return op.call(at::autocast::cached_cast(dtype, hiddens, device), ways, sources);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, AutocastCPU, m) {
  m.impl("defer_gradients", defer_gradients_autocast<c10::DispatchKey::AutocastCPU, at::kCPU>);
}

TORCH_LIBRARY_IMPL(muddformer, AutocastCUDA, m) {
  m.impl("defer_gradients", defer_gradients_autocast<c10::DispatchKey::AutocastCUDA, at::kCUDA>);
}

}  // namespace muddformer
