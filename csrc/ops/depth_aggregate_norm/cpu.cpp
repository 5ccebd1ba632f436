// The aggregation with normed streams on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {
namespace {

NormedStreams depth_aggregate_norm_forward_cpu(at::TensorList hiddens, const at::Tensor& weights,
                                               const StreamNorms& norms) {
  check_depth_aggregate_norm(hiddens, weights, norms);
  return depth_aggregate_norm_forward_composition(hiddens, weights, norms);
}

NormsGradients depth_aggregate_norm_backward_cpu(const OptionalTensors& grad_outputs,
                                                 const OptionalTensors& grad_hiddens,
                                                 at::TensorList hiddens, const at::Tensor& weights,
                                                 const StreamNorms& norms,
                                                 const NormsForward& forward, int64_t deferred) {
  check_depth_aggregate_norm_backward(grad_outputs, grad_hiddens, hiddens, weights, norms, forward,
                                      deferred);
  return depth_aggregate_norm_backward_composition(grad_outputs, grad_hiddens, hiddens, weights,
                                                   norms, forward.statistics, deferred);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("depth_aggregate_norm_forward", flat<depth_aggregate_norm_forward_cpu>);
  m.impl("depth_aggregate_norm_backward", flat<depth_aggregate_norm_backward_cpu>);
}

}  // namespace muddformer::detail
