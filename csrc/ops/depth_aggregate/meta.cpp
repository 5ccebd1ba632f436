// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

std::vector<at::Tensor> depth_aggregate_meta(at::TensorList hiddens, const at::Tensor& weights) {
  check_depth_aggregate(hiddens, weights);
  return empty_of_each(weights.sym_size(-2).guard_int(__FILE__, __LINE__), hiddens[0]);
}

std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward_meta(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, int64_t deferred) {
  check_depth_aggregate_backward(grad_outputs, grad_hiddens, hiddens, weights, deferred);
  return {empty_of_each(static_cast<int64_t>(hiddens.size()) - deferred, hiddens[0]),
          empty_of(weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregate", depth_aggregate_meta);
  m.impl("depth_aggregate_backward", depth_aggregate_backward_meta);
}

}  // namespace muddformer::detail
