// What the operator's backends know of the decoding form of a layer.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../common/dispatch.h"

namespace muddformer::detail {

// Norms as the schema spells them here: the fields that a step can make.
struct StepNorms : StreamNorms {};

template <>
struct Spelling<const StepNorms&> {
  using Arguments = Types<const OptionalTensors&, const OptionalTensors&, std::string_view, double>;
  static StepNorms join(const OptionalTensors& weights, const OptionalTensors& biases,
                        std::string_view kind, double eps) {
    return {{std::string(kind), eps, weights, biases}};
  }
  static auto split(const StepNorms& n) {
    return std::tuple<const OptionalTensors&, const OptionalTensors&, std::string_view, double>(
        n.weights, n.biases, n.kind, n.eps);
  }
};

void check_depth_aggregation_step(at::TensorList hiddens, const std::optional<at::Tensor>& w1,
                                  const std::optional<at::Tensor>& w2, const at::Tensor& prior,
                                  const GeneratorOptions& options, const StepNorms& norms);

// The most tokens that the kernel takes on x's device; in cuda.cpp.
int64_t step_tokens_by_cuda(const at::Tensor& newest);

}  // namespace muddformer::detail
