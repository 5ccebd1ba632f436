// What the autograd kernels of several operators do alike, and at less cost than by default.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace muddformer::detail {

// A tangent of forward mode, of which no operator has a derivative.
inline bool has_tangent(const at::Tensor& tensor) {
  return tensor.defined() && tensor._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && has_tangent(*tensor);
}
inline bool has_tangent(at::TensorList tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor& tensor) { return has_tangent(tensor); });
}

// Calls go past the autograd kernels, but for inputs with tangents, which these refuse by name.
class PastAutograd {
 public:
  template <typename... Inputs>
  explicit PastAutograd(const Inputs&... inputs) {
    if (!(has_tangent(inputs) || ...)) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

// The same in a backward while gradients are off. The autograd kernels of operators without
// derivatives, which are there to name the operator in an error, take long for lists of tensors.
class PastAutogradInBackward {
 public:
  explicit PastAutogradInBackward(at::TensorList grads) {
    if (!c10::GradMode::is_enabled() && !has_tangent(grads)) guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

// Whether nothing but autograd and autocast sees calls in this thread: no mode of Python, no
// tracer, no transform.
inline bool only_autograd_watches() {
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included - c10::default_included_set - c10::autocast_dispatch_keyset)
             .highestFunctionalityKey() == c10::DispatchKey::Undefined;
}

// Whether a tensor is no more than memory with sizes, strides and autograd's data.
inline bool is_ordinary(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kPlain = c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                         c10::autocast_dispatch_keyset |
                                         c10::DispatchKeySet(c10::DispatchKey::Dense);
  return (tensor.key_set() - kPlain).highestFunctionalityKey() == c10::DispatchKey::Undefined;
}

// A tensor of its own on the memory of a plain one, without edges; what is written into one counts
// as a change of the other.
inline at::Tensor alias_of(const at::Tensor& tensor) {
  const at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return at::Tensor(impl->shallow_copy_and_detach(impl->version_counter(),
                                                  /*allow_tensor_metadata_change=*/true));
}

// The first `count` tensors without autograd's edges: their gradients are deferred, and an edge
// that never brings one is more than compiled autograd can add up.
inline std::vector<at::Tensor> without_edges(at::TensorList tensors, int64_t count) {
  std::vector<at::Tensor> result = tensors.vec();
  const bool unwatched = only_autograd_watches();
  for (int64_t j = 0; j < count; ++j) {
    result[j] = unwatched && is_ordinary(result[j]) ? alias_of(result[j]) : result[j].detach();
  }
  return result;
}

}  // namespace muddformer::detail
