#include <torch/library.h>

#include "../common/checks.h"
#include "../common/rows.h"
#include "../connection_weights/internal.h"
#include "depth_aggregation_step.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "depth_aggregation_step(Tensor[] hiddens, Tensor? w1, Tensor? w2, Tensor prior, Tensor? "
      "scale, float eps, str gelu_approximate, float? cap, Tensor?[] norm_weights, Tensor?[] "
      "norm_biases, str norm, float norm_eps) -> Tensor[]",
      tags);
  m.def("fuses_step(Tensor newest) -> bool", tags);
  // The most tokens for which it is true: 0 where it never is.
  m.def("step_tokens(Tensor newest) -> int", tags);
}

static int64_t step_tokens(const at::Tensor& newest) {
#ifdef MUDDFORMER_WITH_CUDA
  if (newest.is_cuda()) return detail::step_tokens_by_cuda(newest);
#else
  (void)newest;
#endif
  return 0;
}

bool fuses_step(const at::Tensor& newest) {
  detail::check_defined(newest, {"newest"});
  const int64_t most = step_tokens(newest);
  return most > 0 && newest.sym_numel() <= newest.sym_size(-1) * most;
}

TORCH_LIBRARY_IMPL(muddformer, CompositeImplicitAutograd, m) {
  m.impl("fuses_step", fuses_step);
  m.impl("step_tokens", step_tokens);
}

std::vector<at::Tensor> depth_aggregation_step(at::TensorList hiddens,
                                               const std::optional<at::Tensor>& w1,
                                               const std::optional<at::Tensor>& w2,
                                               const at::Tensor& prior,
                                               const GeneratorOptions& options,
                                               const StreamNorms& norms) {
  TORCH_CHECK_VALUE(
      !norms.add_newest && !norms.pre_weight.has_value() && !norms.post_weight.has_value(),
      "norms: expected none of add_newest, pre_weight, post_weight in a step, got ",
      norms.add_newest               ? "add_newest"
      : norms.pre_weight.has_value() ? "pre_weight"
                                     : "post_weight");
  detail::check_defined(prior, {"prior"});
  using Step = std::vector<at::Tensor>(at::TensorList, const std::optional<at::Tensor>&,
                                       const std::optional<at::Tensor>&, const at::Tensor&,
                                       const GeneratorOptions&, const detail::StepNorms&);
  static const detail::Operator<Step> op("depth_aggregation_step");
  return op(hiddens, w1, w2, prior, options, {norms});
}

namespace detail {

static void check_sources(at::TensorList hiddens) {
  TORCH_CHECK_VALUE(!hiddens.empty(), "hiddens: expected at least one hidden state, got none");
  const at::Tensor& first = hiddens[0];
  check_floating(first, {"hiddens", 0});
  TORCH_CHECK_VALUE(first.dim() >= 1 && first.sym_size(-1) >= 1,
                    "hiddens[0]: expected shape [..., D] with D >= 1, got ", first.sym_sizes());
  for (size_t j = 1; j < hiddens.size(); ++j) {
    check_like(hiddens[j], {"hiddens", static_cast<int64_t>(j)}, first, "hiddens[0]");
  }
}

// The parameters of the streams' norms.
static void check_norms(const OptionalTensors& list, const char* name, const at::Tensor& x,
                        int64_t ways) {
  TORCH_CHECK_VALUE(list.empty() || static_cast<int64_t>(list.size()) == ways, name,
                    ": expected none or C = ", ways, " entries, got ", list.size());
  for (size_t c = 0; c < list.size(); ++c) {
    const std::optional<at::Tensor> tensor = list.get(c);
    if (!tensor.has_value()) continue;
    const ArgumentName argument{name, static_cast<int64_t>(c)};
    check_dtype_or_float32(*tensor, argument, x, "hiddens");
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(-1), argument,
                      ": expected shape [D] with D = ", x.sym_size(-1), " of hiddens, got ",
                      tensor->sym_sizes());
  }
}

void check_depth_aggregation_step(at::TensorList hiddens, const std::optional<at::Tensor>& w1,
                                  const std::optional<at::Tensor>& w2, const at::Tensor& prior,
                                  const GeneratorOptions& options, const StepNorms& norms) {
  check_sources(hiddens);
  const at::Tensor& x = hiddens.back();
  check_dtype_or_float32(prior, {"prior"}, x, "hiddens");
  TORCH_CHECK_VALUE(prior.dim() == 2 && prior.sym_size(0) >= 1 &&
                        prior.sym_size(1) == static_cast<int64_t>(hiddens.size()),
                    "prior: expected shape [C, S] with C >= 1 and S = ", hiddens.size(),
                    " (the number of hidden states), got ", prior.sym_sizes());
  TORCH_CHECK_VALUE(w1.has_value() == w2.has_value(), "w1 and w2: expected both or neither, got ",
                    w1.has_value() ? "w1 alone" : "w2 alone");
  if (w1.has_value()) {
    check_connection_weights(x, *w1, *w2, prior, options);
  } else {
    TORCH_CHECK_VALUE(!options.scale.has_value(),
                      "scale: expected None without w1 and w2, got a tensor");
    check_generator_options(options, x.scalar_type());
  }
  TORCH_CHECK_VALUE(norms.kind == "none" || norms.kind == "rms" || norms.kind == "layer",
                    "norm: expected 'none', 'rms' or 'layer', got '", norms.kind, "'");
  check_eps(norms.eps, "norm_eps");
  const int64_t ways = prior.sym_size(0).guard_int(__FILE__, __LINE__);
  check_norms(norms.weights, "norm_weights", x, ways);
  check_norms(norms.biases, "norm_biases", x, ways);
  for (int64_t c = 0; c < ways; ++c) {
    const bool weight = entry(norms.weights, c).has_value();
    TORCH_CHECK_VALUE(!weight || norms.kind != "none", "norm_weights[", c,
                      "]: expected None with norm='none', got a tensor");
    TORCH_CHECK_VALUE(!entry(norms.biases, c).has_value() || (weight && norms.kind == "layer"),
                      "norm_biases[", c,
                      "]: expected None without norm='layer' and a norm weight, got a tensor");
  }
}

}  // namespace detail
}  // namespace muddformer
