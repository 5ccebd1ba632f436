// Checks of the ops' arguments, shared by all backends. An error names the argument, what was
// expected and what came. Sizes may be symbolic.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <ostream>
#include <string_view>

namespace muddformer {

// Name of an argument or of an entry of a list argument; formatted only when an error is raised.
struct ArgumentName {
  const char* name;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& out, const ArgumentName& argument) {
  out << argument.name;
  if (argument.index >= 0) out << '[' << argument.index << ']';
  return out;
}

inline void check_defined(const at::Tensor& tensor, ArgumentName argument) {
  TORCH_CHECK_TYPE(tensor.defined(), argument, ": expected a tensor, got None");
}

inline void check_floating(const at::Tensor& tensor, ArgumentName argument) {
  check_defined(tensor, argument);
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kDouble || dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
      argument, ": expected dtype float64, float32, bfloat16 or float16, got ", dtype);
}

inline void check_same_device(const at::Tensor& tensor, ArgumentName argument,
                              const at::Tensor& like, const char* like_name) {
  TORCH_CHECK_VALUE(tensor.device() == like.device(), argument, ": expected device ", like.device(),
                    " of ", like_name, ", got ", tensor.device());
}

inline void check_same_dtype_device(const at::Tensor& tensor, ArgumentName argument,
                                    const at::Tensor& like, const char* like_name) {
  check_defined(tensor, argument);
  TORCH_CHECK_TYPE(tensor.scalar_type() == like.scalar_type(), argument, ": expected dtype ",
                   like.scalar_type(), " of ", like_name, ", got ", tensor.scalar_type());
  check_same_device(tensor, argument, like, like_name);
}

// Defined in the .cpp of the operator.
void check_hiddens(at::TensorList hiddens);
void check_depth_aggregate(at::TensorList hiddens, const at::Tensor& weights);
void check_depth_aggregate_backward(const c10::List<std::optional<at::Tensor>>& grad_outputs,
                                    const c10::List<std::optional<at::Tensor>>& grad_hiddens,
                                    at::TensorList hiddens, const at::Tensor& weights,
                                    int64_t deferred);
void check_deferral(at::TensorList hiddens, const at::Tensor& weights, at::TensorList tickets,
                    int64_t deferred);
void check_defer_gradients(at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources);
// Returns a tensor of the shape, dtype and device of the gradients.
at::Tensor check_deferred_flush(const c10::List<std::optional<at::Tensor>>& grad_hiddens,
                                const c10::List<std::optional<at::Tensor>>& grad_sums,
                                at::TensorList weights);
void check_depth_aggregate_norm(at::TensorList hiddens, const at::Tensor& weights,
                                const c10::List<std::optional<at::Tensor>>& norm_weights,
                                const c10::List<std::optional<at::Tensor>>& norm_biases,
                                std::string_view norm, double eps, bool add_newest,
                                const std::optional<at::Tensor>& pre_weight,
                                const std::optional<at::Tensor>& post_weight);
// With add_newest or pre_weight the newest hidden state must not be deferred.
void check_newest_kept(at::TensorList hiddens, bool add_newest,
                       const std::optional<at::Tensor>& pre_weight, int64_t deferred);
// What check_depth_aggregate_norm() checks, and what is the backward's own.
void check_depth_aggregate_norm_backward(const c10::List<std::optional<at::Tensor>>& grad_outputs,
                                         const c10::List<std::optional<at::Tensor>>& grad_hiddens,
                                         at::TensorList hiddens, const at::Tensor& weights,
                                         const c10::List<std::optional<at::Tensor>>& norm_weights,
                                         const c10::List<std::optional<at::Tensor>>& norm_biases,
                                         std::string_view norm, double eps, bool add_newest,
                                         const std::optional<at::Tensor>& pre_weight,
                                         const std::optional<at::Tensor>& post_weight,
                                         at::TensorList outputs, const at::Tensor& mix,
                                         const at::Tensor& statistics, int64_t deferred);
void check_connection_weights(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                              const at::Tensor& prior, const std::optional<at::Tensor>& scale,
                              double eps, std::string_view gelu_approximate,
                              std::optional<double> cap);
void check_connection_weights_backward(const at::Tensor& grad_weights,
                                       const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
                                       const at::Tensor& w1, const at::Tensor& prior,
                                       const std::optional<at::Tensor>& weights,
                                       const at::Tensor& hidden, const at::Tensor& factor,
                                       std::optional<double> cap);

// Whether way c has a norm: one of its own, or, the last one, the post norm.
inline bool has_norm(const c10::List<std::optional<at::Tensor>>& norm_weights,
                     const std::optional<at::Tensor>& post_weight, int64_t c) {
  const std::optional<at::Tensor> weight = norm_weights.get(c);
  return (weight.has_value() && weight->defined()) ||
         (post_weight.has_value() && c + 1 == static_cast<int64_t>(norm_weights.size()));
}

// float32 for everything but float64: the type that products and sums are accumulated in.
inline at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace muddformer
