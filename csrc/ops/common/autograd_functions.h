// What the autograd kernels of several operators do alike, and at less cost than by default.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <vector>

namespace muddformer::detail {

// While gradients are off, calls go past the autograd kernels. Those of operators without
// derivatives, which are there to name the operator in an error, take long for lists of tensors.
class PastAutogradWithoutGradients {
 public:
  PastAutogradWithoutGradients() {
    if (!c10::GradMode::is_enabled()) guard_.emplace();
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
inline bool is_plain(const at::Tensor& tensor) {
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
    result[j] = unwatched && is_plain(result[j]) ? alias_of(result[j]) : result[j].detach();
  }
  return result;
}

// Appends inputs of an autograd function to its outputs. Autograd makes a view of an input that is
// returned; with an alias that it does not know it has less to do.
inline void hand_on(std::vector<at::Tensor>& outputs, at::TensorList inputs) {
  const bool unwatched = only_autograd_watches();
  outputs.reserve(outputs.size() + inputs.size());
  for (const at::Tensor& input : inputs) {
    outputs.push_back(unwatched && is_plain(input) ? alias_of(input) : input);
  }
}

}  // namespace muddformer::detail
