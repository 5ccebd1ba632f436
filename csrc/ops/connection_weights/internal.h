// What the operator's backends and the operators built on it know of the connection weights.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/generator.h"

namespace muddformer::detail {

/// (weights [..., C, S], h [..., K] = RMSNorm(x) W1^T of the dtype of x, r [...] =
/// rsqrt(mean(x^2) + eps) in float32, float64 for float64).
using WeightsAndKept = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

/// connection_weights() that also returns what its backward reads instead of computing it again.
WeightsAndKept connection_weights_forward(const at::Tensor& x, const at::Tensor& w1,
                                          const at::Tensor& w2, const at::Tensor& prior,
                                          const GeneratorOptions& options);

/// What the backward knows of the forward: its options (eps is in r) and what it returned, of which
/// the weights are needed under a cap alone.
struct WeightsForward {
  GeneratorOptions options;
  std::optional<at::Tensor> weights;
  at::Tensor hidden;
  at::Tensor factor;
};

template <>
struct Spelling<const WeightsForward&> {
  using Arguments =
      Types<const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, const at::Tensor&,
            const at::Tensor&, std::string_view, std::optional<double>>;
  static WeightsForward join(const std::optional<at::Tensor>& scale,
                             const std::optional<at::Tensor>& weights, const at::Tensor& hidden,
                             const at::Tensor& factor, std::string_view gelu_approximate,
                             std::optional<double> cap) {
    return {{scale, 0, std::string(gelu_approximate), cap}, weights, hidden, factor};
  }
  static auto split(const WeightsForward& f) {
    return std::tuple<const std::optional<at::Tensor>&, const std::optional<at::Tensor>&,
                      const at::Tensor&, const at::Tensor&, std::string_view,
                      std::optional<double>>(f.options.scale, f.weights, f.hidden, f.factor,
                                             f.options.gelu_approximate, f.options.cap);
  }
};

/// Of (x, w1, w2, prior, scale); of shape [0] where one is not wanted, or there is no scale.
using WeightsGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Gradients of connection_weights_chained().
///
/// @param grad_weights gradient of the weights [..., C, S].
/// @param grad_x gradient of the handed-on x [..., D]; nullopt stands for zero.
/// @param wanted which of the five gradients are needed.
WeightsGradients connection_weights_backward(const at::Tensor& grad_weights,
                                             const std::optional<at::Tensor>& grad_x,
                                             const at::Tensor& x, const at::Tensor& w1,
                                             const at::Tensor& w2, const at::Tensor& prior,
                                             const WeightsForward& forward,
                                             std::array<bool, 5> wanted);

void check_connection_weights(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                              const at::Tensor& prior, const GeneratorOptions& options);
// What check_connection_weights() checks, and what is the backward's own.
void check_connection_weights_backward(const at::Tensor& grad_weights,
                                       const std::optional<at::Tensor>& grad_x, const at::Tensor& x,
                                       const at::Tensor& w1, const at::Tensor& w2,
                                       const at::Tensor& prior, const WeightsForward& forward);
// The options that are numbers and words.
// Options for weights of this dtype.
void check_generator_options(const GeneratorOptions& options, at::ScalarType dtype);
// prior, scale and the like: the dtype of x, or float32.
void check_dtype_or_float32(const at::Tensor& tensor, ArgumentName argument, const at::Tensor& x,
                            const char* x_name);

}  // namespace muddformer::detail
