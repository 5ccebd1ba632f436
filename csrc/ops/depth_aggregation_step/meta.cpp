// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "internal.h"

namespace muddformer::detail {
namespace {

std::vector<at::Tensor> depth_aggregation_step_meta(at::TensorList hiddens,
                                                    const std::optional<at::Tensor>& w1,
                                                    const std::optional<at::Tensor>& w2,
                                                    const at::Tensor& prior,
                                                    const GeneratorOptions& options,
                                                    const StepNorms& norms) {
  check_depth_aggregation_step(hiddens, w1, w2, prior, options, norms);
  return empty_of_each(prior.sym_size(0).guard_int(__FILE__, __LINE__), hiddens[0]);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregation_step", flat<depth_aggregation_step_meta>);
}

}  // namespace muddformer::detail
