// Kernels under autocast: they cast their arguments and call the operator again. They are written
// once, take the casts of a device type before the operator's own arguments, and are registered for
// the CPU and for CUDA.
#pragma once

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "dispatch.h"

namespace muddformer::detail {

class AutocastCasts {
 public:
  explicit AutocastCasts(c10::DeviceType device)
      : device_(device), dtype_(at::autocast::get_autocast_dtype(device)) {}

  // To the autocast dtype: what is large.
  at::Tensor narrow(const at::Tensor& tensor) const { return cast(dtype_, tensor); }
  std::vector<at::Tensor> narrow(at::TensorList tensors) const {
    return at::autocast::cached_cast(dtype_, tensors, device_);
  }
  std::optional<at::Tensor> narrow(const std::optional<at::Tensor>& tensor) const {
    return cast(dtype_, tensor);
  }

  // To float32: parameters that are small.
  at::Tensor wide(const at::Tensor& tensor) const { return cast(at::kFloat, tensor); }
  std::optional<at::Tensor> wide(const std::optional<at::Tensor>& tensor) const {
    return cast(at::kFloat, tensor);
  }
  OptionalTensors wide(const OptionalTensors& tensors) const {
    OptionalTensors result;
    result.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) result.push_back(wide(tensors.get(i)));
    return result;
  }
  GeneratorOptions wide(GeneratorOptions options) const {
    options.scale = wide(options.scale);
    return options;
  }
  StreamNorms wide(StreamNorms norms) const {
    norms.weights = wide(norms.weights);
    norms.biases = wide(norms.biases);
    norms.pre_weight = wide(norms.pre_weight);
    norms.post_weight = wide(norms.post_weight);
    return norms;
  }

 private:
  at::Tensor cast(at::ScalarType to, const at::Tensor& tensor) const {
    return at::autocast::cached_cast(to, tensor, device_);
  }
  std::optional<at::Tensor> cast(at::ScalarType to, const std::optional<at::Tensor>& tensor) const {
    if (!tensor.has_value() || !tensor->defined()) return std::nullopt;
    return cast(to, *tensor);
  }

  c10::DeviceType device_;
  at::ScalarType dtype_;
};

template <c10::DeviceType device, auto kernel, typename Function = decltype(kernel)>
struct UnderAutocast;
template <c10::DeviceType device, auto kernel, typename Result, typename... Parameters>
struct UnderAutocast<device, kernel, Result (*)(const AutocastCasts&, Parameters...)> {
  static Result call(Parameters... parameters) {
    const c10::impl::ExcludeDispatchKeyGuard guard(
        at::autocast::get_autocast_dispatch_key_from_device_type(device));
    return kernel(AutocastCasts(device), std::forward<Parameters>(parameters)...);
  }
};

// A static object of this type holds an operator's kernels.
class AutocastLibrary {
 public:
  template <auto kernel>
  AutocastLibrary impl(const char* name) && {
    cpu_.impl(name, flat<UnderAutocast<at::kCPU, kernel>::call>);
    cuda_.impl(name, flat<UnderAutocast<at::kCUDA, kernel>::call>);
    return std::move(*this);
  }

 private:
  static torch::Library library(c10::DispatchKey key) {
    return {torch::Library::IMPL, "muddformer", key, __FILE__, __LINE__};
  }

  torch::Library cpu_ = library(c10::DispatchKey::AutocastCPU);
  torch::Library cuda_ = library(c10::DispatchKey::AutocastCUDA);
};

}  // namespace muddformer::detail
