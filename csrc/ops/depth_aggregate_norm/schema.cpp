#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>

#include "../common/checks.h"
#include "depth_aggregate_norm.h"

namespace muddformer {

#define NORM_ARGUMENTS                                                                          \
  "Tensor[] hiddens, Tensor weights, Tensor?[] norm_weights, Tensor?[] norm_biases, str norm, " \
  "float eps, bool add_newest, Tensor? pre_weight, Tensor? post_weight"

// The same as types.
#define NORM_PARAMETERS                                                              \
  at::TensorList, const at::Tensor&, const OptionalTensors&, const OptionalTensors&, \
      std::string_view, double, bool, const std::optional<at::Tensor>&,              \
      const std::optional<at::Tensor>&

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("depth_aggregate_norm_chained(" NORM_ARGUMENTS ") -> (Tensor[], Tensor[])", tags);
  m.def("depth_aggregate_norm_chained.deferred(" NORM_ARGUMENTS
        ", Tensor[] tickets, int deferred) -> (Tensor[], Tensor[])",
        tags);
  m.def("depth_aggregate_norm_forward(" NORM_ARGUMENTS ") -> (Tensor[], Tensor, Tensor, Tensor)",
        tags);
  m.def(
      "depth_aggregate_norm_backward(Tensor?[] grad_outputs, Tensor?[] "
      "grad_hiddens, " NORM_ARGUMENTS
      ", Tensor[] outputs, Tensor mix, Tensor statistics, int deferred=0) -> (Tensor[], Tensor, "
      "Tensor[], Tensor[], Tensor, Tensor, Tensor[])",
      tags);
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_norm_chained(
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight,
    const Deferral& deferral) {
  using Results = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregate_norm_chained", "")
                             .typed<Results(NORM_PARAMETERS)>();
  if (deferral.tickets.empty()) {
    return op.call(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest, pre_weight,
                   post_weight);
  }
  static const auto deferred_op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("muddformer::depth_aggregate_norm_chained", "deferred")
          .typed<Results(NORM_PARAMETERS, at::TensorList, int64_t)>();
  return deferred_op.call(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest,
                          pre_weight, post_weight, deferral.tickets, deferral.count);
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
depth_aggregate_norm_forward(at::TensorList hiddens, const at::Tensor& weights,
                             const OptionalTensors& norm_weights,
                             const OptionalTensors& norm_biases, std::string_view norm, double eps,
                             bool add_newest, const std::optional<at::Tensor>& pre_weight,
                             const std::optional<at::Tensor>& post_weight) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregate_norm_forward", "")
                             .typed<decltype(depth_aggregate_norm_forward)>();
  return op.call(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest, pre_weight,
                 post_weight);
}

std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
           at::Tensor, at::Tensor, std::vector<at::Tensor>>
depth_aggregate_norm_backward(const OptionalTensors& grad_outputs,
                              const OptionalTensors& grad_hiddens, at::TensorList hiddens,
                              const at::Tensor& weights, const OptionalTensors& norm_weights,
                              const OptionalTensors& norm_biases, std::string_view norm, double eps,
                              bool add_newest, const std::optional<at::Tensor>& pre_weight,
                              const std::optional<at::Tensor>& post_weight, at::TensorList outputs,
                              const at::Tensor& mix, const at::Tensor& statistics,
                              int64_t deferred) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregate_norm_backward", "")
                             .typed<decltype(depth_aggregate_norm_backward)>();
  return op.call(grad_outputs, grad_hiddens, hiddens, weights, norm_weights, norm_biases, norm, eps,
                 add_newest, pre_weight, post_weight, outputs, mix, statistics, deferred);
}

namespace {

std::optional<at::Tensor> entry(const OptionalTensors& tensors, size_t i) {
  const std::optional<at::Tensor> tensor = tensors.get(i);
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

// A norm's weight or bias: [D], of the dtype of the hidden states or float32, all alike.
void check_norm_parameter(const at::Tensor& tensor, ArgumentName argument, const at::Tensor& like,
                          std::optional<at::ScalarType>& dtype) {
  check_floating(tensor, argument);
  const at::ScalarType wanted = dtype.value_or(like.scalar_type());
  const at::ScalarType came = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      came == wanted || (!dtype.has_value() && came == at::kFloat), argument, ": expected dtype ",
      wanted, dtype.has_value() ? " of the other norm parameters" : " of hiddens[0] or float32",
      ", got ", came);
  dtype = came;
  check_same_device(tensor, argument, like, "hiddens[0]");
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.sym_size(0) == like.sym_size(-1), argument,
                    ": expected shape [", like.sym_size(-1), "], got ", tensor.sym_sizes());
}

}  // namespace

void check_depth_aggregate_norm(at::TensorList hiddens, const at::Tensor& weights,
                                const OptionalTensors& norm_weights,
                                const OptionalTensors& norm_biases, std::string_view norm,
                                double eps, bool add_newest,
                                const std::optional<at::Tensor>& pre_weight,
                                const std::optional<at::Tensor>& post_weight) {
  check_depth_aggregate(hiddens, weights);
  const at::Tensor& like = hiddens[0];
  const auto ways = static_cast<size_t>(weights.sym_size(-2).guard_int(__FILE__, __LINE__));
  TORCH_CHECK_VALUE(ways <= 62, "weights: expected at most 62 ways, got ", ways);
  TORCH_CHECK_VALUE(norm_weights.size() == ways, "norm_weights: expected C = ", ways,
                    " entries, got ", norm_weights.size());
  TORCH_CHECK_VALUE(norm_biases.size() == ways, "norm_biases: expected C = ", ways,
                    " entries, got ", norm_biases.size());
  TORCH_CHECK_VALUE(norm == "rms" || norm == "layer", "norm: expected 'rms' or 'layer', got '",
                    norm, "'");
  TORCH_CHECK_VALUE(eps >= 0 && std::isfinite(eps), "eps: expected a number of at least 0, got ",
                    eps);
  std::optional<at::ScalarType> dtype;
  for (size_t c = 0; c < ways; ++c) {
    const auto weight = entry(norm_weights, c), bias = entry(norm_biases, c);
    const auto index = static_cast<int64_t>(c);
    if (weight.has_value()) check_norm_parameter(*weight, {"norm_weights", index}, like, dtype);
    if (!bias.has_value()) continue;
    TORCH_CHECK_VALUE(weight.has_value(), ArgumentName{"norm_biases", index},
                      ": expected None for a way without a norm weight, got a tensor");
    check_norm_parameter(*bias, {"norm_biases", index}, like, dtype);
  }
  if (pre_weight.has_value()) check_norm_parameter(*pre_weight, {"pre_weight"}, like, dtype);
  if (post_weight.has_value()) {
    TORCH_CHECK_VALUE(add_newest, "post_weight: expected None without add_newest, got a tensor");
    TORCH_CHECK_VALUE(!entry(norm_weights, ways - 1).has_value(), "norm_weights[", ways - 1,
                      "]: expected None with post_weight, got a tensor");
    check_norm_parameter(*post_weight, {"post_weight"}, like, dtype);
  }
}

void check_newest_kept(at::TensorList hiddens, bool add_newest,
                       const std::optional<at::Tensor>& pre_weight, int64_t deferred) {
  TORCH_CHECK_VALUE(
      deferred < static_cast<int64_t>(hiddens.size()) || !(add_newest || pre_weight.has_value()),
      "deferred: expected fewer than the ", hiddens.size(),
      " hidden states with add_newest or pre_weight, got ", deferred);
}

void check_depth_aggregate_norm_backward(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight,
    at::TensorList outputs, const at::Tensor& mix, const at::Tensor& statistics, int64_t deferred) {
  check_depth_aggregate_norm(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest,
                             pre_weight, post_weight);
  check_depth_aggregate_backward(grad_outputs, grad_hiddens, hiddens, weights, deferred);
  check_newest_kept(hiddens, add_newest, pre_weight, deferred);
  const at::Tensor& like = hiddens[0];
  const size_t ways = norm_weights.size();
  TORCH_CHECK_VALUE(outputs.size() == ways, "outputs: expected C = ", ways, " streams, got ",
                    outputs.size());
  const auto check_like = [&](const at::Tensor& tensor, ArgumentName argument) {
    check_same_dtype_device(tensor, argument, like, "hiddens[0]");
    TORCH_CHECK_VALUE(tensor.sym_sizes() == like.sym_sizes(), argument, ": expected shape ",
                      like.sym_sizes(), " of hiddens[0], got ", tensor.sym_sizes());
  };
  for (size_t c = 0; c < ways; ++c) {
    if (entry(norm_weights, c).has_value()) {
      check_like(outputs[c], {"outputs", static_cast<int64_t>(c)});
    }
  }
  if (post_weight.has_value()) check_like(mix, {"mix"});
  check_same_device(statistics, {"statistics"}, like, "hiddens[0]");
  const at::ScalarType wide = accumulation_dtype(like.scalar_type());
  TORCH_CHECK_TYPE(statistics.scalar_type() == wide, "statistics: expected dtype ", wide, ", got ",
                   statistics.scalar_type());
  c10::SymInt tokens = 1;
  for (const c10::SymInt& size : like.sym_sizes().slice(0, like.dim() - 1)) tokens = tokens * size;
  const auto norms = static_cast<int64_t>(ways) + (pre_weight.has_value() ? 1 : 0);
  TORCH_CHECK_VALUE(statistics.dim() == 3 && statistics.sym_size(0) == 2 &&
                        statistics.sym_size(1) == norms && statistics.sym_size(2) == tokens,
                    "statistics: expected shape [2, ", norms, ", ", tokens, "], got ",
                    statistics.sym_sizes());
}

}  // namespace muddformer
