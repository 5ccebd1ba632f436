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
  return empty_gradients(hiddens, weights, norms, deferred,
                         [](const at::Tensor& tensor, bool given) {
                           return given ? empty_of(tensor) : empty_none(tensor);
                         });
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregate_norm_forward", flat<depth_aggregate_norm_forward_meta>);
  m.impl("depth_aggregate_norm_backward", flat<depth_aggregate_norm_backward_meta>);
}

}  // namespace muddformer::detail
