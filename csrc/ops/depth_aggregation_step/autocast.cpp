// Under autocast the hidden states, W1 and W2 take the autocast dtype; the small parameters are
// read in float32.
#include "../common/autocast.h"

#include "depth_aggregation_step.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

std::vector<at::Tensor> step(const AutocastCasts& casts, at::TensorList hiddens,
                             const std::optional<at::Tensor>& w1,
                             const std::optional<at::Tensor>& w2, const at::Tensor& prior,
                             const GeneratorOptions& options, const StepNorms& norms) {
  return depth_aggregation_step(casts.narrow(hiddens), casts.narrow(w1), casts.narrow(w2),
                                casts.wide(prior), casts.wide(options), casts.wide(norms));
}

const AutocastLibrary library = AutocastLibrary().impl<step>("depth_aggregation_step");

}  // namespace
}  // namespace muddformer::detail
