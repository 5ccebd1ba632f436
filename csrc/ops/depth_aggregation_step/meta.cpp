// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "composition.h"

namespace muddformer {
namespace {

std::vector<at::Tensor> depth_aggregation_step_meta(
    at::TensorList hiddens, const std::optional<at::Tensor>& w1,
    const std::optional<at::Tensor>& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
    std::optional<double> cap, const c10::List<std::optional<at::Tensor>>& norm_weights,
    const c10::List<std::optional<at::Tensor>>& norm_biases, std::string_view norm,
    double norm_eps) {
  check_depth_aggregation_step(hiddens, w1, w2, prior, scale, eps, gelu_approximate, cap,
                               norm_weights, norm_biases, norm, norm_eps);
  const int64_t ways = prior.sym_size(0).guard_int(__FILE__, __LINE__);
  std::vector<at::Tensor> outputs;
  outputs.reserve(ways);
  for (int64_t c = 0; c < ways; ++c) {
    outputs.push_back(at::empty_symint(hiddens[0].sym_sizes(), hiddens[0].options()));
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregation_step", depth_aggregation_step_meta);
}

}  // namespace muddformer
