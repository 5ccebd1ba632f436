#include <torch/library.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/rows.h"
#include "../depth_aggregate/internal.h"
#include "deferred_flush.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("defer_gradients(Tensor[] hiddens, int[] ways, int[] sources) -> (Tensor[], Tensor[])",
        tags);
  m.def("deferred_flush(Tensor?[] grad_hiddens, Tensor?[] grad_sums, Tensor[] weights) -> Tensor[]",
        tags);
}

std::tuple<std::vector<at::Tensor>, std::vector<Deferral>> defer_gradients(
    at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources) {
  static const detail::Operator<std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>>(
      at::TensorList, at::IntArrayRef, at::IntArrayRef)>
      op("defer_gradients");
  auto [handed_on, tickets] = op(hiddens, ways, sources);
  std::vector<Deferral> deferrals;
  auto next = tickets.begin();
  for (const int64_t count : ways) {
    deferrals.push_back({{next, next + count + 1}, static_cast<int64_t>(hiddens.size())});
    next += count + 1;
  }
  return {std::move(handed_on), std::move(deferrals)};
}

namespace detail {

std::vector<at::Tensor> deferred_flush(const OptionalTensors& grad_hiddens,
                                       const OptionalTensors& grad_sums, at::TensorList weights) {
  static const Operator<decltype(deferred_flush)> op("deferred_flush");
  return op(grad_hiddens, grad_sums, weights);
}

void check_defer_gradients(at::TensorList hiddens, at::IntArrayRef ways, at::IntArrayRef sources) {
  check_hiddens(hiddens);
  const auto count = static_cast<int64_t>(hiddens.size());
  TORCH_CHECK_VALUE(!ways.empty(), "ways: expected a number for each layer, got none");
  TORCH_CHECK_VALUE(ways.size() == sources.size(), "sources: expected ", ways.size(),
                    " numbers, as many as ways, got ", sources.size());
  constexpr int64_t kMost = int64_t{1} << 16;  // of ways, in the whole group, and of sources
  int64_t left = kMost;
  for (size_t i = 0; i < ways.size(); ++i) {
    TORCH_CHECK_VALUE(ways[i] >= 1, "ways[", i, "]: expected at least 1, got ", ways[i]);
    TORCH_CHECK_VALUE(ways[i] <= left, "ways[", i, "]: expected at most ", kMost,
                      " ways of all layers together, got ", ways[i], " after ", kMost - left);
    left -= ways[i];
    TORCH_CHECK_VALUE(sources[i] >= count, "sources[", i, "]: expected at least ", count,
                      " (the number of hiddens), got ", sources[i]);
    TORCH_CHECK_VALUE(sources[i] <= kMost, "sources[", i, "]: expected at most ", kMost, ", got ",
                      sources[i]);
  }
}

at::Tensor check_deferred_flush(const OptionalTensors& grad_hiddens,
                                const OptionalTensors& grad_sums, at::TensorList weights) {
  TORCH_CHECK_VALUE(!grad_hiddens.empty(), "grad_hiddens: expected at least one entry, got none");
  TORCH_CHECK_VALUE(!weights.empty(), "weights: expected at least one layer, got none");
  at::Tensor like;
  const auto check_all = [&](const OptionalTensors& tensors, const char* name) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const ArgumentName argument{name, static_cast<int64_t>(i)};
      const std::optional<at::Tensor> tensor = entry(tensors, i);
      if (!tensor.has_value()) continue;
      if (!like.defined()) {
        check_floating(*tensor, argument);
        TORCH_CHECK_VALUE(tensor->dim() >= 1, argument, ": expected shape [..., D], got a scalar");
        like = *tensor;
      }
      check_like(*tensor, argument, like, "grad_sums");
    }
  };
  check_all(grad_sums, "grad_sums");
  TORCH_CHECK_VALUE(like.defined(), "grad_sums: expected at least one tensor, got None alone");
  check_all(grad_hiddens, "grad_hiddens");
  const auto leading = like.sym_sizes().slice(0, like.dim() - 1);
  c10::SymInt ways = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const at::Tensor& w = weights[i];
    check_same_dtype_device(w, {"weights", static_cast<int64_t>(i)}, like, "grad_sums");
    TORCH_CHECK_VALUE(
        w.dim() == like.dim() + 1 && w.sym_sizes().slice(0, leading.size()) == leading &&
            w.sym_size(-1) >= static_cast<int64_t>(grad_hiddens.size()),
        "weights[", i, "]: expected shape [..., C, S] with leading shape ", leading,
        " and S >= ", grad_hiddens.size(), " (the number of grad_hiddens), got ", w.sym_sizes());
    ways = ways + w.sym_size(-2);
  }
  TORCH_CHECK_VALUE(ways == static_cast<int64_t>(grad_sums.size()), "grad_sums: expected ", ways,
                    " entries, one for each way of all weights, got ", grad_sums.size());
  return like;
}

}  // namespace detail
}  // namespace muddformer
