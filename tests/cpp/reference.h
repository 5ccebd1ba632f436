// The naive formulation of both ops in plain ATen: what the C++ tests and benchmarks compare with.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

namespace muddformer::reference {

// Y_c = sum_j weights[..., c, j] * hiddens[j], in the dtype of the inputs.
inline std::vector<at::Tensor> depth_aggregate(at::TensorList hiddens, const at::Tensor& weights) {
  std::vector<at::Tensor> outputs;
  for (int64_t c = 0; c < weights.size(-2); ++c) {
    at::Tensor sum = at::zeros_like(hiddens[0]);
    for (int64_t j = 0; j < weights.size(-1); ++j) {
      sum = sum + weights.select(-2, c).select(-1, j).unsqueeze(-1) * hiddens[j];
    }
    outputs.push_back(sum);
  }
  return outputs;
}

// A = GELU(RMSNorm(x) W1^T) W2^T + prior, optionally cap * tanh(A / cap).
inline at::Tensor connection_weights(const at::Tensor& x, const at::Tensor& w1,
                                     const at::Tensor& w2, const at::Tensor& prior,
                                     const std::optional<at::Tensor>& scale = std::nullopt,
                                     double eps = 1e-6,
                                     const std::string& gelu_approximate = "none",
                                     std::optional<double> cap = std::nullopt) {
  at::Tensor normed = x * at::rsqrt(x.square().mean(-1, true) + eps);
  if (scale.has_value()) normed = normed * *scale;
  at::Tensor a = at::linear(at::gelu(at::linear(normed, w1), gelu_approximate), w2);
  at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.append(prior.sizes().begin(), prior.sizes().end());
  a = a.view(shape) + prior;
  return cap.has_value() ? at::tanh(a / *cap) * *cap : a;
}

}  // namespace muddformer::reference
