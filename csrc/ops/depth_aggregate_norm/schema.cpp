#include <torch/library.h>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../depth_aggregate/internal.h"
#include "depth_aggregate_norm.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const std::string arguments =
      "Tensor[] hiddens, Tensor weights, Tensor?[] norm_weights, Tensor?[] norm_biases, str norm, "
      "float eps, bool add_newest, Tensor? pre_weight, Tensor? post_weight";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };
  define("depth_aggregate_norm_chained(" + arguments + ") -> (Tensor[], Tensor[])");
  define("depth_aggregate_norm_chained.deferred(" + arguments +
         ", Tensor[] tickets, int deferred) -> (Tensor[], Tensor[])");
  define("depth_aggregate_norm_forward(" + arguments + ") -> (Tensor[], Tensor, Tensor, Tensor)");
  define("depth_aggregate_norm_backward(Tensor?[] grad_outputs, Tensor?[] grad_hiddens, " +
         arguments +
         ", Tensor[] outputs, Tensor mix, Tensor statistics, int deferred=0) -> (Tensor[], Tensor, "
         "Tensor[], Tensor[], Tensor, Tensor, Tensor[])");
  define("fuses_norms(Tensor x, int sources, int ways) -> bool");
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("fuses_norms", fuses_norms);
}

bool fuses_norms(const at::Tensor& x, int64_t sources, int64_t ways) {
  detail::check_defined(x, {"x"});
#ifdef MUDDFORMER_WITH_CUDA
  if (x.is_cuda()) return detail::norms_fused_by_cuda(x, sources, ways);
#endif
  (void)sources, (void)ways;
  return false;
}

// With an entry a way, as the schema has the lists.
static StreamNorms of_every_way(StreamNorms norms, const at::Tensor& weights) {
  if (!weights.defined() || weights.dim() < 2) return norms;  // an error to come
  for (OptionalTensors* list : {&norms.weights, &norms.biases}) {
    if (!list->empty()) continue;
    *list = OptionalTensors();  // not the caller's
    list->resize(weights.sym_size(-2).guard_int(__FILE__, __LINE__));
  }
  return norms;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> depth_aggregate_norm_chained(
    at::TensorList hiddens, const at::Tensor& weights, const StreamNorms& given,
    const Deferral& deferral) {
  const StreamNorms norms = of_every_way(given, weights);
  using Results = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;
  if (deferral.tickets.empty() && deferral.count == 0) {
    static const detail::Operator<Results(at::TensorList, const at::Tensor&, const StreamNorms&)>
        op("depth_aggregate_norm_chained");
    return op(hiddens, weights, norms);
  }
  static const detail::Operator<Results(at::TensorList, const at::Tensor&, const StreamNorms&,
                                        at::TensorList, int64_t)>
      op("depth_aggregate_norm_chained", "deferred");
  return op(hiddens, weights, norms, deferral.tickets, deferral.count);
}

namespace detail {

NormedStreams depth_aggregate_norm_forward(at::TensorList hiddens, const at::Tensor& weights,
                                           const StreamNorms& norms) {
  static const Operator<decltype(depth_aggregate_norm_forward)> op("depth_aggregate_norm_forward");
  return op(hiddens, weights, norms);
}

NormsGradients depth_aggregate_norm_backward(const OptionalTensors& grad_outputs,
                                             const OptionalTensors& grad_hiddens,
                                             at::TensorList hiddens, const at::Tensor& weights,
                                             const StreamNorms& norms, const NormsForward& forward,
                                             int64_t deferred) {
  static const Operator<decltype(depth_aggregate_norm_backward)> op(
      "depth_aggregate_norm_backward");
  return op(grad_outputs, grad_hiddens, hiddens, weights, norms, forward, deferred);
}

bool has_norm(const StreamNorms& norms, int64_t c) {
  return entry(norms.weights, c).has_value() ||
         (norms.post_weight.has_value() && c + 1 == static_cast<int64_t>(norms.weights.size()));
}

namespace {

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
                                const StreamNorms& norms) {
  check_depth_aggregate(hiddens, weights);
  const at::Tensor& like = hiddens[0];
  const auto ways = static_cast<size_t>(weights.sym_size(-2).guard_int(__FILE__, __LINE__));
  TORCH_CHECK_VALUE(ways <= 62, "weights: expected at most 62 ways, got ", ways);
  TORCH_CHECK_VALUE(norms.weights.size() == ways, "norm_weights: expected C = ", ways,
                    " entries, got ", norms.weights.size());
  TORCH_CHECK_VALUE(norms.biases.size() == ways, "norm_biases: expected C = ", ways,
                    " entries, got ", norms.biases.size());
  TORCH_CHECK_VALUE(norms.kind == "none" || norms.kind == "rms" || norms.kind == "layer",
                    "norm: expected 'none', 'rms' or 'layer', got '", norms.kind, "'");
  check_eps(norms.eps, "eps");
  std::optional<at::ScalarType> dtype;
  for (size_t c = 0; c < ways; ++c) {
    const auto weight = entry(norms.weights, c), bias = entry(norms.biases, c);
    const auto index = static_cast<int64_t>(c);
    if (weight.has_value()) {
      TORCH_CHECK_VALUE(norms.kind != "none", ArgumentName{"norm_weights", index},
                        ": expected None with norm='none', got a tensor");
      check_norm_parameter(*weight, {"norm_weights", index}, like, dtype);
    }
    if (!bias.has_value()) continue;
    TORCH_CHECK_VALUE(weight.has_value(), ArgumentName{"norm_biases", index},
                      ": expected None for a way without a norm weight, got a tensor");
    TORCH_CHECK_VALUE(norms.kind == "layer", ArgumentName{"norm_biases", index},
                      ": expected None for the norm 'rms', got a tensor");
    check_norm_parameter(*bias, {"norm_biases", index}, like, dtype);
  }
  if (norms.pre_weight.has_value()) {
    check_norm_parameter(*norms.pre_weight, {"pre_weight"}, like, dtype);
  }
  if (norms.post_weight.has_value()) {
    TORCH_CHECK_VALUE(norms.add_newest,
                      "post_weight: expected None without add_newest, got a tensor");
    TORCH_CHECK_VALUE(!entry(norms.weights, ways - 1).has_value(), "norm_weights[", ways - 1,
                      "]: expected None with post_weight, got a tensor");
    check_norm_parameter(*norms.post_weight, {"post_weight"}, like, dtype);
  }
}

void check_newest_kept(at::TensorList hiddens, const StreamNorms& norms, int64_t deferred) {
  TORCH_CHECK_VALUE(deferred < static_cast<int64_t>(hiddens.size()) ||
                        !(norms.add_newest || norms.pre_weight.has_value()),
                    "deferred: expected fewer than the ", hiddens.size(),
                    " hidden states with add_newest or pre_weight, got ", deferred);
}

void check_depth_aggregate_norm_backward(const OptionalTensors& grad_outputs,
                                         const OptionalTensors& grad_hiddens,
                                         at::TensorList hiddens, const at::Tensor& weights,
                                         const StreamNorms& norms, const NormsForward& forward,
                                         int64_t deferred) {
  check_depth_aggregate_norm(hiddens, weights, norms);
  check_depth_aggregate_backward(grad_outputs, grad_hiddens, hiddens, weights, deferred);
  check_newest_kept(hiddens, norms, deferred);
  const at::Tensor& like = hiddens[0];
  const size_t ways = norms.weights.size();
  TORCH_CHECK_VALUE(forward.outputs.size() == ways, "outputs: expected C = ", ways,
                    " streams, got ", forward.outputs.size());
  for (size_t c = 0; c < ways; ++c) {
    if (entry(norms.weights, c).has_value()) {
      check_like(forward.outputs[c], {"outputs", static_cast<int64_t>(c)}, like, "hiddens[0]");
    }
  }
  if (norms.post_weight.has_value()) check_like(forward.mix, {"mix"}, like, "hiddens[0]");
  const at::Tensor& statistics = forward.statistics;
  check_same_device(statistics, {"statistics"}, like, "hiddens[0]");
  const at::ScalarType wide = accumulation_dtype(like.scalar_type());
  TORCH_CHECK_TYPE(statistics.scalar_type() == wide, "statistics: expected dtype ", wide, ", got ",
                   statistics.scalar_type());
  c10::SymInt tokens = 1;
  for (const c10::SymInt& size : like.sym_sizes().slice(0, like.dim() - 1)) tokens = tokens * size;
  const auto rows = static_cast<int64_t>(ways) + (norms.pre_weight.has_value() ? 1 : 0);
  TORCH_CHECK_VALUE(statistics.dim() == 3 && statistics.sym_size(0) == 2 &&
                        statistics.sym_size(1) == rows && statistics.sym_size(2) == tokens,
                    "statistics: expected shape [2, ", rows, ", ", tokens, "], got ",
                    statistics.sym_sizes());
}

}  // namespace detail
}  // namespace muddformer
