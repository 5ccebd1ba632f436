// Head and loss on the CPU.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "chunks.h"

namespace muddformer::detail {
namespace {

constexpr int64_t kMostBytes = int64_t{64} << 20;  // of logits in memory
// Of a temporary, for each thread: it stays in the caches, and needs no fresh pages.
constexpr int64_t kCachedEntries = int64_t{1} << 18;

void check_classes(const at::Tensor& targets, int64_t classes, int64_t ignore_index) {
  if (targets.numel() == 0) return;
  const at::Tensor wrong = targets.lt(0).logical_or_(targets.ge(classes));
  const at::Tensor among = targets.masked_select(wrong.logical_and_(targets.ne(ignore_index)));
  TORCH_CHECK_INDEX(among.numel() == 0, "targets: expected classes from 0 to V - 1 = ", classes - 1,
                    ", or ignore_index ", ignore_index, ", got ",
                    among.numel() == 0 ? 0 : among[0].item<int64_t>());
}

LossesAndGradients linear_cross_entropy_losses_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& grad_losses,
    const TokenLossOptions& options, std::array<bool, 3> wanted) {
  const auto step = [&options](const at::Tensor& logits, const at::Tensor& of_chunk,
                               const std::optional<at::Tensor>& grads, const at::Tensor& losses,
                               bool gradients) {
    check_classes(of_chunk, logits.size(1), options.ignore_index);
    const int64_t tokens = logits.size(0), classes = std::max<int64_t>(logits.size(1), 1);
    const int64_t rows = std::max<int64_t>(kCachedEntries * at::get_num_threads() / classes, 1);
    for (int64_t first = 0; first < tokens; first += rows) {
      const int64_t count = std::min(rows, tokens - first);
      const auto part = [&](const at::Tensor& of_tokens) {
        return of_tokens.narrow(0, first, count);
      };
      loss_step_composition(part(logits), part(of_chunk),
                            grads ? std::optional(part(*grads)) : std::nullopt, part(losses),
                            gradients, options);
    }
  };
  return losses_in_chunks(hidden, weight, targets, bias, grad_losses, options, wanted, kMostBytes,
                          product_composition, step);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("linear_cross_entropy_losses", flat<linear_cross_entropy_losses_cpu>);
}

}  // namespace muddformer::detail
