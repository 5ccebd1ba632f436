// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/checks.h"

namespace muddformer {
namespace {

std::vector<at::Tensor> depth_aggregate_meta(at::TensorList hiddens, const at::Tensor& weights) {
  check_depth_aggregate(hiddens, weights);
  const int64_t ways = weights.sym_size(-2).guard_int(__FILE__, __LINE__);
  std::vector<at::Tensor> outputs;
  outputs.reserve(ways);
  for (int64_t c = 0; c < ways; ++c) {
    outputs.push_back(at::empty_symint(hiddens[0].sym_sizes(), hiddens[0].options()));
  }
  return outputs;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward_meta(
    const c10::List<std::optional<at::Tensor>>& grad_outputs,
    const c10::List<std::optional<at::Tensor>>& grad_hiddens, at::TensorList hiddens,
    const at::Tensor& weights, int64_t deferred) {
  check_depth_aggregate_backward(grad_outputs, grad_hiddens, hiddens, weights, deferred);
  std::vector<at::Tensor> grads;
  grads.reserve(hiddens.size());
  for (size_t j = deferred; j < hiddens.size(); ++j) {
    grads.push_back(at::empty_symint(hiddens[0].sym_sizes(), hiddens[0].options()));
  }
  return {std::move(grads), at::empty_symint(weights.sym_sizes(), weights.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregate", depth_aggregate_meta);
  m.impl("depth_aggregate_backward", depth_aggregate_backward_meta);
}

}  // namespace muddformer
