// Under autocast the history is kept in the autocast dtype, as by depth_aggregate_chained.
#include "../common/autocast.h"

#include "deferred_flush.h"

namespace muddformer::detail {
namespace {

using HiddensAndTickets = std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>;

HiddensAndTickets defer(const AutocastCasts& casts, at::TensorList hiddens, at::IntArrayRef ways,
                        at::IntArrayRef sources) {
  static const Operator<HiddensAndTickets(at::TensorList, at::IntArrayRef, at::IntArrayRef)> op(
      "defer_gradients");
  return op(casts.narrow(hiddens), ways, sources);
}

const AutocastLibrary library = AutocastLibrary().impl<defer>("defer_gradients");

}  // namespace
}  // namespace muddformer::detail
