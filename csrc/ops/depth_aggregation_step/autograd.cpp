// The decoding form of a layer has no gradients: an argument that wants one is an error at once,
// not a result that is cut off from it.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>

#include "depth_aggregation_step.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

bool wants_gradient(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->requires_grad();
}

bool wants_gradient(const OptionalTensors& list) {
  return std::any_of(list.begin(), list.end(), [](const std::optional<at::Tensor>& tensor) {
    return wants_gradient(tensor);
  });
}

std::vector<at::Tensor> depth_aggregation_step_autograd(at::TensorList hiddens,
                                                        const std::optional<at::Tensor>& w1,
                                                        const std::optional<at::Tensor>& w2,
                                                        const at::Tensor& prior,
                                                        const GeneratorOptions& options,
                                                        const StepNorms& norms) {
  const bool wanted =
      std::any_of(hiddens.begin(), hiddens.end(),
                  [](const at::Tensor& x) { return x.defined() && x.requires_grad(); }) ||
      wants_gradient(w1) || wants_gradient(w2) || wants_gradient(prior) ||
      wants_gradient(options.scale) || wants_gradient(norms.weights) ||
      wants_gradient(norms.biases);
  TORCH_CHECK(!wanted || !at::GradMode::is_enabled(),
              "depth_aggregation_step has no gradients: call it under torch.no_grad() or "
              "torch.inference_mode(), or use connection_weights and depth_aggregate");
  const at::AutoDispatchBelowADInplaceOrView guard;
  return depth_aggregation_step(hiddens, w1, w2, prior, options, norms);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Autograd, m) {
  m.impl("depth_aggregation_step", flat<depth_aggregation_step_autograd>);
}

}  // namespace muddformer::detail
