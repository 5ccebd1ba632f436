#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <cmath>

#include "../common/checks.h"
#include "composition.h"
#include "depth_aggregation_step.h"

namespace muddformer {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "depth_aggregation_step(Tensor[] hiddens, Tensor? w1, Tensor? w2, Tensor prior, Tensor? "
      "scale, float eps, str gelu_approximate, float? cap, Tensor?[] norm_weights, Tensor?[] "
      "norm_biases, str norm, float norm_eps) -> Tensor[]",
      tags);
}

std::vector<at::Tensor> depth_aggregation_step(
    at::TensorList hiddens, const std::optional<at::Tensor>& w1,
    const std::optional<at::Tensor>& w2, const at::Tensor& prior,
    const std::optional<at::Tensor>& scale, double eps, std::string_view gelu_approximate,
    std::optional<double> cap, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double norm_eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("muddformer::depth_aggregation_step", "")
                             .typed<decltype(depth_aggregation_step)>();
  return op.call(hiddens, w1, w2, prior, scale, eps, gelu_approximate, cap, norm_weights,
                 norm_biases, norm, norm_eps);
}

static void check_sources(at::TensorList hiddens) {
  TORCH_CHECK_VALUE(!hiddens.empty(), "hiddens: expected at least one hidden state, got none");
  const at::Tensor& first = hiddens[0];
  check_floating(first, {"hiddens", 0});
  TORCH_CHECK_VALUE(first.dim() >= 1 && first.sym_size(-1) >= 1,
                    "hiddens[0]: expected shape [..., D] with D >= 1, got ", first.sym_sizes());
  for (size_t j = 1; j < hiddens.size(); ++j) {
    const ArgumentName argument{"hiddens", static_cast<int64_t>(j)};
    check_same_dtype_device(hiddens[j], argument, first, "hiddens[0]");
    TORCH_CHECK_VALUE(hiddens[j].sym_sizes() == first.sym_sizes(), argument, ": expected shape ",
                      first.sym_sizes(), " of hiddens[0], got ", hiddens[j].sym_sizes());
  }
}

// The prior, and the norms' weights and biases.
static void check_parameter(const at::Tensor& tensor, ArgumentName argument, const at::Tensor& x) {
  check_defined(tensor, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == at::kFloat,
                   argument, ": expected dtype ", x.scalar_type(), " of hiddens or Float, got ",
                   tensor.scalar_type());
  check_same_device(tensor, argument, x, "hiddens");
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
    check_parameter(*tensor, argument, x);
    TORCH_CHECK_VALUE(tensor->dim() == 1 && tensor->sym_size(0) == x.sym_size(-1), argument,
                      ": expected shape [D] with D = ", x.sym_size(-1), " of hiddens, got ",
                      tensor->sym_sizes());
  }
}

static void check_eps(double eps, const char* name) {
  TORCH_CHECK_VALUE(std::isfinite(eps) && eps >= 0, name, ": expected a finite number >= 0, got ",
                    eps);
}

void check_depth_aggregation_step(at::TensorList hiddens, const std::optional<at::Tensor>& w1,
                                  const std::optional<at::Tensor>& w2, const at::Tensor& prior,
                                  const std::optional<at::Tensor>& scale, double eps,
                                  std::string_view gelu_approximate, std::optional<double> cap,
                                  const OptionalTensors& norm_weights,
                                  const OptionalTensors& norm_biases, std::string_view norm,
                                  double norm_eps) {
  check_sources(hiddens);
  const at::Tensor& x = hiddens.back();
  check_parameter(prior, {"prior"}, x);
  TORCH_CHECK_VALUE(prior.dim() == 2 && prior.sym_size(0) >= 1 &&
                        prior.sym_size(1) == static_cast<int64_t>(hiddens.size()),
                    "prior: expected shape [C, S] with C >= 1 and S = ", hiddens.size(),
                    " (the number of hidden states), got ", prior.sym_sizes());
  TORCH_CHECK_VALUE(w1.has_value() == w2.has_value(), "w1 and w2: expected both or neither, got ",
                    w1.has_value() ? "w1 alone" : "w2 alone");
  if (w1.has_value()) {
    check_connection_weights(x, *w1, *w2, prior, scale, eps, gelu_approximate, cap);
  } else {
    TORCH_CHECK_VALUE(!scale.has_value(), "scale: expected None without w1 and w2, got a tensor");
    check_eps(eps, "eps");
    TORCH_CHECK_VALUE(gelu_approximate == "none" || gelu_approximate == "tanh",
                      "gelu_approximate: expected 'none' or 'tanh', got '", gelu_approximate, "'");
    TORCH_CHECK_VALUE(!cap.has_value() || (std::isfinite(*cap) && *cap > 0),
                      "cap: expected a finite number > 0 or None, got ", cap.value_or(0));
  }
  TORCH_CHECK_VALUE(norm == "none" || norm == "rms" || norm == "layer",
                    "norm: expected 'none', 'rms' or 'layer', got '", norm, "'");
  check_eps(norm_eps, "norm_eps");
  const int64_t ways = prior.sym_size(0).guard_int(__FILE__, __LINE__);
  check_norms(norm_weights, "norm_weights", x, ways);
  check_norms(norm_biases, "norm_biases", x, ways);
  for (int64_t c = 0; c < ways; ++c) {
    const bool weight = entry(norm_weights, c).has_value();
    TORCH_CHECK_VALUE(!weight || norm != "none", "norm_weights[", c,
                      "]: expected None with norm='none', got a tensor");
    TORCH_CHECK_VALUE(!entry(norm_biases, c).has_value() || (weight && norm == "layer"),
                      "norm_biases[", c,
                      "]: expected None without norm='layer' and a norm weight, got a tensor");
  }
}

}  // namespace muddformer
