#include <torch/library.h>

#include "connection_weights.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "connection_weights(Tensor x, Tensor w1, Tensor w2, Tensor prior, Tensor? scale=None, "
      "float eps=1e-6, str gelu_approximate='none', float? cap=None) -> Tensor",
      tags);
  m.def(
      "connection_weights_chained(Tensor x, Tensor w1, Tensor w2, Tensor prior, Tensor? "
      "scale=None, float eps=1e-6, str gelu_approximate='none', float? cap=None) -> (Tensor, "
      "Tensor)",
      tags);
  m.def(
      "connection_weights_forward(Tensor x, Tensor w1, Tensor w2, Tensor prior, Tensor? "
      "scale=None, float eps=1e-6, str gelu_approximate='none', float? cap=None) -> (Tensor, "
      "Tensor, "
      "Tensor)",
      tags);
  m.def(
      "connection_weights_backward(Tensor grad_weights, Tensor? grad_x, Tensor x, Tensor w1, "
      "Tensor w2, Tensor prior, Tensor? scale, Tensor? weights, Tensor hidden, Tensor factor, str "
      "gelu_approximate, float? cap, bool[5] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

at::Tensor connection_weights(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                              const at::Tensor& prior, const GeneratorOptions& options) {
  detail::check_defined(x, {"x"});
  static const detail::Operator<decltype(connection_weights)> op("connection_weights");
  return op(x, w1, w2, prior, options);
}

std::tuple<at::Tensor, at::Tensor> connection_weights_chained(const at::Tensor& x,
                                                              const at::Tensor& w1,
                                                              const at::Tensor& w2,
                                                              const at::Tensor& prior,
                                                              const GeneratorOptions& options) {
  detail::check_defined(x, {"x"});
  static const detail::Operator<decltype(connection_weights_chained)> op(
      "connection_weights_chained");
  return op(x, w1, w2, prior, options);
}

namespace detail {

WeightsAndKept connection_weights_forward(const at::Tensor& x, const at::Tensor& w1,
                                          const at::Tensor& w2, const at::Tensor& prior,
                                          const GeneratorOptions& options) {
  static const Operator<decltype(connection_weights_forward)> op("connection_weights_forward");
  return op(x, w1, w2, prior, options);
}

WeightsGradients connection_weights_backward(const at::Tensor& grad_weights,
                                             const std::optional<at::Tensor>& grad_x,
                                             const at::Tensor& x, const at::Tensor& w1,
                                             const at::Tensor& w2, const at::Tensor& prior,
                                             const WeightsForward& forward,
                                             std::array<bool, 5> wanted) {
  static const Operator<decltype(connection_weights_backward)> op("connection_weights_backward");
  return op(grad_weights, grad_x, x, w1, w2, prior, forward, wanted);
}

void check_dtype_or_float32(const at::Tensor& tensor, ArgumentName argument, const at::Tensor& x,
                            const char* x_name) {
  check_defined(tensor, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == at::kFloat,
                   argument, ": expected dtype ", x.scalar_type(), " of ", x_name,
                   " or Float, got ", tensor.scalar_type());
  check_same_device(tensor, argument, x, x_name);
}

void check_generator_options(const GeneratorOptions& options, at::ScalarType dtype) {
  check_eps(options.eps, "eps");
  const std::string& gelu = options.gelu_approximate;
  TORCH_CHECK_VALUE(gelu == "none" || gelu == "tanh",
                    "gelu_approximate: expected 'none' or 'tanh', got '", gelu, "'");
  check_cap(options.cap, dtype);
}

void check_connection_weights(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                              const at::Tensor& prior, const GeneratorOptions& options) {
  check_floating(x, {"x"});
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.sym_size(-1) >= 1,
                    "x: expected shape [..., D] with D >= 1, got ", x.sym_sizes());
  check_same_dtype_device(w1, {"w1"}, x, "x");
  TORCH_CHECK_VALUE(w1.dim() == 2 && w1.sym_size(1) == x.sym_size(-1),
                    "w1: expected shape [K, D] with D = ", x.sym_size(-1), " of x, got ",
                    w1.sym_sizes());
  check_dtype_or_float32(prior, {"prior"}, x, "x");
  TORCH_CHECK_VALUE(prior.dim() == 2 && prior.sym_size(0) >= 1 && prior.sym_size(1) >= 1,
                    "prior: expected shape [C, S] with C >= 1 and S >= 1, got ", prior.sym_sizes());
  check_same_dtype_device(w2, {"w2"}, x, "x");
  TORCH_CHECK_VALUE(w2.dim() == 2 && w2.sym_size(0) == prior.sym_size(0) * prior.sym_size(1) &&
                        w2.sym_size(1) == w1.sym_size(0),
                    "w2: expected shape [C*S, K] = [", prior.sym_size(0) * prior.sym_size(1), ", ",
                    w1.sym_size(0), "], got ", w2.sym_sizes(), " with prior ", prior.sym_sizes());
  if (options.scale.has_value()) {
    check_dtype_or_float32(*options.scale, {"scale"}, x, "x");
    TORCH_CHECK_VALUE(options.scale->dim() == 1 && options.scale->sym_size(0) == x.sym_size(-1),
                      "scale: expected shape [D] with D = ", x.sym_size(-1), " of x, got ",
                      options.scale->sym_sizes());
  }
  check_generator_options(options, x.scalar_type());
}

// A tensor of the tokens of x: their shape and then `last`.
static void check_of_tokens(const at::Tensor& tensor, ArgumentName argument, const at::Tensor& x,
                            c10::SymIntArrayRef last) {
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end() - 1);
  shape.append(last.begin(), last.end());
  TORCH_CHECK_VALUE(tensor.sym_sizes() == c10::SymIntArrayRef(shape), argument, ": expected shape ",
                    c10::SymIntArrayRef(shape), ", got ", tensor.sym_sizes());
}

void check_connection_weights_backward(const at::Tensor& grad_weights,
                                       const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
                                       const at::Tensor& w1, const at::Tensor& w2,
                                       const at::Tensor& prior, const WeightsForward& forward) {
  check_connection_weights(x, w1, w2, prior, forward.options);
  const auto& [options, weights, hidden, factor] = forward;
  check_same_dtype_device(grad_weights, {"grad_weights"}, x, "x");
  check_of_tokens(grad_weights, {"grad_weights"}, x, prior.sym_sizes());
  if (grad_x.has_value()) {
    check_same_dtype_device(*grad_x, {"grad_x"}, x, "x");
    check_of_tokens(*grad_x, {"grad_x"}, x, {x.sym_size(-1)});
  }
  TORCH_CHECK_TYPE(weights.has_value() || !options.cap.has_value(),
                   "weights: expected a tensor where there is a cap, got None");
  if (weights.has_value()) {
    check_same_dtype_device(*weights, {"weights"}, x, "x");
    check_of_tokens(*weights, {"weights"}, x, prior.sym_sizes());
  }
  check_same_dtype_device(hidden, {"hidden"}, x, "x");
  check_of_tokens(hidden, {"hidden"}, x, {w1.sym_size(0)});
  check_defined(factor, {"factor"});
  TORCH_CHECK_TYPE(factor.scalar_type() == accumulation_dtype(x.scalar_type()),
                   "factor: expected dtype ", accumulation_dtype(x.scalar_type()), ", got ",
                   factor.scalar_type());
  check_same_device(factor, {"factor"}, x, "x");
  check_of_tokens(factor, {"factor"}, x, {});
}

}  // namespace detail
}  // namespace muddformer
