// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../common/checks.h"
#include "depth_aggregate_norm.h"

namespace muddformer {
namespace {

at::Tensor empty_of(const at::Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

std::vector<at::Tensor> empty_of_all(const OptionalTensors& tensors, const at::Tensor& like) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<at::Tensor> tensor = tensors.get(i);
    result.push_back(tensor.has_value() && tensor->defined() ? empty_of(*tensor)
                                                             : at::empty({0}, like.options()));
  }
  return result;
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
depth_aggregate_norm_forward_meta(at::TensorList hiddens, const at::Tensor& weights,
                                  const OptionalTensors& norm_weights,
                                  const OptionalTensors& norm_biases, std::string_view norm,
                                  double eps, bool add_newest,
                                  const std::optional<at::Tensor>& pre_weight,
                                  const std::optional<at::Tensor>& post_weight) {
  check_depth_aggregate_norm(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest,
                             pre_weight, post_weight);
  const at::Tensor& like = hiddens[0];
  const auto ways = static_cast<int64_t>(norm_weights.size());
  std::vector<at::Tensor> outputs;
  for (int64_t c = 0; c < ways; ++c) outputs.push_back(empty_of(like));
  c10::SymInt tokens = 1;
  for (const c10::SymInt& size : like.sym_sizes().slice(0, like.dim() - 1)) tokens = tokens * size;
  const int64_t norms = ways + (pre_weight.has_value() ? 1 : 0);
  return {std::move(outputs),
          pre_weight.has_value() ? empty_of(like) : at::empty({0}, like.options()),
          post_weight.has_value() ? empty_of(like) : at::empty({0}, like.options()),
          at::empty_symint({2, norms, tokens},
                           like.options().dtype(accumulation_dtype(like.scalar_type())))};
}

std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
           at::Tensor, at::Tensor, std::vector<at::Tensor>>
depth_aggregate_norm_backward_meta(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight,
    at::TensorList outputs, const at::Tensor& mix, const at::Tensor& statistics, int64_t deferred) {
  check_depth_aggregate_norm_backward(grad_outputs, grad_hiddens, hiddens, weights, norm_weights,
                                      norm_biases, norm, eps, add_newest, pre_weight, post_weight,
                                      outputs, mix, statistics, deferred);
  const at::Tensor& like = hiddens[0];
  std::vector<at::Tensor> grads;
  for (size_t j = deferred; j < hiddens.size(); ++j) grads.push_back(empty_of(like));
  std::vector<at::Tensor> grad_sums;
  for (size_t c = 0; c < norm_weights.size(); ++c) {
    const bool normed = has_norm(norm_weights, post_weight, static_cast<int64_t>(c));
    grad_sums.push_back(deferred > 0 && normed ? empty_of(like) : at::empty({0}, like.options()));
  }
  const auto optional = [&](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() ? empty_of(*tensor) : at::empty({0}, like.options());
  };
  return {std::move(grads),
          empty_of(weights),
          empty_of_all(norm_weights, like),
          empty_of_all(norm_biases, like),
          optional(pre_weight),
          optional(post_weight),
          std::move(grad_sums)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("depth_aggregate_norm_forward", depth_aggregate_norm_forward_meta);
  m.impl("depth_aggregate_norm_backward", depth_aggregate_norm_backward_meta);
}

}  // namespace muddformer
