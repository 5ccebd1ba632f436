// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

std::vector<at::Tensor> deferred_flush_meta(const OptionalTensors& grad_hiddens,
                                            const OptionalTensors& grad_sums,
                                            at::TensorList weights) {
  const at::Tensor like = check_deferred_flush(grad_hiddens, grad_sums, weights);
  return empty_of_each(static_cast<int64_t>(grad_hiddens.size()), like);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("deferred_flush", deferred_flush_meta);
}

}  // namespace muddformer::detail
