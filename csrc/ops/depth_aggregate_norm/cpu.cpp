// The aggregation with normed streams on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer {
namespace {

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
depth_aggregate_norm_forward_cpu(at::TensorList hiddens, const at::Tensor& weights,
                                 const OptionalTensors& norm_weights,
                                 const OptionalTensors& norm_biases, std::string_view norm,
                                 double eps, bool add_newest,
                                 const std::optional<at::Tensor>& pre_weight,
                                 const std::optional<at::Tensor>& post_weight) {
  check_depth_aggregate_norm(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest,
                             pre_weight, post_weight);
  return depth_aggregate_norm_forward_composition(hiddens, weights, norm_weights, norm_biases, norm,
                                                  eps, add_newest, pre_weight, post_weight);
}

std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
           at::Tensor, at::Tensor, std::vector<at::Tensor>>
depth_aggregate_norm_backward_cpu(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight,
    at::TensorList outputs, const at::Tensor& mix, const at::Tensor& statistics, int64_t deferred) {
  check_depth_aggregate_norm_backward(grad_outputs, grad_hiddens, hiddens, weights, norm_weights,
                                      norm_biases, norm, eps, add_newest, pre_weight, post_weight,
                                      outputs, mix, statistics, deferred);
  return depth_aggregate_norm_backward_composition(grad_outputs, grad_hiddens, hiddens, weights,
                                                   norm_weights, norm_biases, norm, eps, add_newest,
                                                   pre_weight, post_weight, statistics, deferred);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("depth_aggregate_norm_forward", depth_aggregate_norm_forward_cpu);
  m.impl("depth_aggregate_norm_backward", depth_aggregate_norm_backward_cpu);
}

}  // namespace muddformer
