// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

NormedStreams depth_aggregate_norm_forward_meta(at::TensorList hiddens, const at::Tensor& weights,
                                                const StreamNorms& norms) {
  check_depth_aggregate_norm(hiddens, weights, norms);
  const at::Tensor& like = hiddens[0];
  const int64_t ways = weights.sym_size(-2).guard_int(__FILE__, __LINE__);
  const bool pre = norms.pre_weight.has_value();
  c10::SymInt tokens = 1;
  for (const c10::SymInt& size : like.sym_sizes().slice(0, like.dim() - 1)) tokens = tokens * size;
  return {empty_of_each(ways, like), pre ? empty_of(like) : empty_none(like),
          norms.post_weight.has_value() ? empty_of(like) : empty_none(like),
          at::empty_symint({2, ways + (pre ? 1 : 0), tokens},
                           like.options().dtype(accumulation_dtype(like.scalar_type())))};
}

NormsGradients depth_aggregate_norm_backward_meta(const OptionalTensors& grad_outputs,
                                                  const OptionalTensors& grad_hiddens,
                                                  at::TensorList hiddens, const at::Tensor& weights,
                                                  const StreamNorms& norms,
                                                  const NormsForward& forward, int64_t deferred) {
  check_depth_aggregate_norm_backward(grad_outputs, grad_hiddens, hiddens, weights, norms, forward,
                                      deferred);
  return empty_gradients(hiddens, weights, norms, deferred);
}

}  // namespace

NormsGradients empty_gradients(at::TensorList hiddens, const at::Tensor& weights,
                               const StreamNorms& norms, int64_t deferred) {
  const at::Tensor& like = hiddens[0];
  const int64_t ways = weights.sym_size(-2).guard_int(__FILE__, __LINE__);
  std::vector<at::Tensor> grad_norm_weights, grad_norm_biases, grad_sums;
  for (int64_t c = 0; c < ways; ++c) {
    grad_norm_weights.push_back(empty_of(entry(norms.weights, c), like));
    grad_norm_biases.push_back(empty_of(entry(norms.biases, c), like));
    grad_sums.push_back(deferred > 0 && has_norm(norms, c) ? empty_of(like) : empty_none(like));
  }
  return {empty_of_each(static_cast<int64_t>(hiddens.size()) - deferred, like),
          empty_of(weights),
          std::move(grad_norm_weights),
          std::move(grad_norm_biases),
          empty_of(norms.pre_weight, like),
          empty_of(norms.post_weight, like),
          std::move(grad_sums)};
}

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregate_norm_forward", flat<depth_aggregate_norm_forward_meta>);
  m.impl("depth_aggregate_norm_backward", flat<depth_aggregate_norm_backward_meta>);
}

}  // namespace muddformer::detail
