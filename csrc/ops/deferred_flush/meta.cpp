// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/checks.h"

namespace muddformer {
namespace {

std::vector<at::Tensor> deferred_flush_meta(
    const c10::List<std::optional<at::Tensor>>& grad_hiddens,
    const c10::List<std::optional<at::Tensor>>& grad_sums, at::TensorList weights) {
  const at::Tensor like = check_deferred_flush(grad_hiddens, grad_sums, weights);
  std::vector<at::Tensor> grads;
  for (size_t j = 0; j < grad_hiddens.size(); ++j) {
    grads.push_back(at::empty_symint(like.sym_sizes(), like.options()));
  }
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("deferred_flush", deferred_flush_meta);
}

}  // namespace muddformer
