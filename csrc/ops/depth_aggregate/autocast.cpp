// Under autocast the history is kept in the autocast dtype. The chained form hands the cast sources
// on, so that a hidden state is cast once, when it joins, and not in every layer.
#include "../common/autocast.h"

#include "depth_aggregate.h"

namespace muddformer::detail {
namespace {

using StreamsAndHiddens = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

std::vector<at::Tensor> aggregate(const AutocastCasts& casts, at::TensorList hiddens,
                                  const at::Tensor& weights) {
  return depth_aggregate(casts.narrow(hiddens), casts.narrow(weights));
}

StreamsAndHiddens chained(const AutocastCasts& casts, at::TensorList hiddens,
                          const at::Tensor& weights) {
  return depth_aggregate_chained(casts.narrow(hiddens), casts.narrow(weights));
}

StreamsAndHiddens deferred_chained(const AutocastCasts& casts, at::TensorList hiddens,
                                   const at::Tensor& weights, at::TensorList tickets,
                                   int64_t deferred) {
  return depth_aggregate_chained(casts.narrow(hiddens), casts.narrow(weights),
                                 {tickets.vec(), deferred});
}

const AutocastLibrary library = AutocastLibrary()
                                    .impl<aggregate>("depth_aggregate")
                                    .impl<chained>("depth_aggregate_chained")
                                    .impl<deferred_chained>("depth_aggregate_chained.deferred");

}  // namespace
}  // namespace muddformer::detail
