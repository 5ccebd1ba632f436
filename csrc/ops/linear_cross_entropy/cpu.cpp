// Head and loss on the CPU.
#include <torch/library.h>

#include "chunks.h"

namespace muddformer::detail {
namespace {

constexpr int64_t kMostBytes = int64_t{64} << 20;  // of logits in memory

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
    loss_step_composition(logits, of_chunk, grads, losses, gradients, options);
  };
  return losses_in_chunks(hidden, weight, targets, bias, grad_losses, options, wanted, kMostBytes,
                          product_composition, step);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("linear_cross_entropy_losses", flat<linear_cross_entropy_losses_cpu>);
}

}  // namespace muddformer::detail
