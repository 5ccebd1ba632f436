// Under autocast x, W1 and W2 take the autocast dtype; the small prior and scale are read in
// float32.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "connection_weights.h"

namespace muddformer {
namespace {

template <c10::DispatchKey key, c10::DeviceType device, auto op>
auto cast_and_call(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                   const at::Tensor& prior, const std::optional<at::Tensor>& scale, double eps,
                   std::string_view gelu_approximate, std::optional<double> cap) {
  const c10::impl::ExcludeDispatchKeyGuard guard(key);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(device);
  return op(at::autocast::cached_cast(dtype, x, device),
            at::autocast::cached_cast(dtype, w1, device),
            at::autocast::cached_cast(dtype, w2, device),
            at::autocast::cached_cast(at::kFloat, prior, device),
            scale.has_value()
                ? std::optional<at::Tensor>(at::autocast::cached_cast(at::kFloat, *scale, device))
                : std::nullopt,
            eps, gelu_approximate, cap);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, AutocastCPU, m) {
  constexpr auto key = c10::DispatchKey::AutocastCPU;
  m.impl("connection_weights", cast_and_call<key, at::kCPU, connection_weights>);
  m.impl("connection_weights_chained", cast_and_call<key, at::kCPU, connection_weights_chained>);
}

TORCH_LIBRARY_IMPL(muddformer, AutocastCUDA, m) {
  constexpr auto key = c10::DispatchKey::AutocastCUDA;
  m.impl("connection_weights", cast_and_call<key, at::kCUDA, connection_weights>);
  m.impl("connection_weights_chained", cast_and_call<key, at::kCUDA, connection_weights_chained>);
}

}  // namespace muddformer
