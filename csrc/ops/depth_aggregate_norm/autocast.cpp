// Under autocast the history is kept in the autocast dtype, as by depth_aggregate_chained; the
// norms' parameters are read in float32.
#include "../common/autocast.h"

#include "depth_aggregate_norm.h"

namespace muddformer::detail {
namespace {

using StreamsAndHiddens = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

StreamsAndHiddens chained(const AutocastCasts& casts, at::TensorList hiddens,
                          const at::Tensor& weights, const StreamNorms& norms) {
  return depth_aggregate_norm_chained(casts.narrow(hiddens), casts.narrow(weights),
                                      casts.wide(norms));
}

StreamsAndHiddens deferred_chained(const AutocastCasts& casts, at::TensorList hiddens,
                                   const at::Tensor& weights, const StreamNorms& norms,
                                   at::TensorList tickets, int64_t deferred) {
  return depth_aggregate_norm_chained(casts.narrow(hiddens), casts.narrow(weights),
                                      casts.wide(norms), {tickets.vec(), deferred});
}

const AutocastLibrary library =
    AutocastLibrary()
        .impl<chained>("depth_aggregate_norm_chained")
        .impl<deferred_chained>("depth_aggregate_norm_chained.deferred");

}  // namespace
}  // namespace muddformer::detail
