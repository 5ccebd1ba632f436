// Head and loss on the CPU: products by PyTorch, in between the kernel of cpu/token_losses.h, a token
// at a time. Where the logits have 16 bits their gradients are float32: both products that need
// them add up in float32, and are faster than those of 16 bits on CPUs without instructions for them.
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "../common/cpu_dispatch.h"
#include "../common/recycled_memory.h"
#include "chunks.h"
#include "cpu/token_losses.h"

namespace muddformer::detail {
namespace {

// Of logits in memory; with 16 bits their gradients take twice as many beside them.
constexpr int64_t kMostBytes = int64_t{64} << 20;

const cpu::TokenLossesKernels& token_losses_kernels() {
#if defined(MUDDFORMER_X86_KERNELS)
  static const std::string capability = cpu_capability();
  if (capability == "AVX512") return cpu::token_losses_avx512;
  if (capability == "AVX2") return cpu::token_losses_avx2;
#endif
  return cpu::token_losses_default;
}

void check_classes(const at::Tensor& targets, int64_t classes, int64_t ignore_index) {
  if (targets.numel() == 0) return;
  const at::Tensor wrong = targets.lt(0).logical_or_(targets.ge(classes));
  const at::Tensor among = targets.masked_select(wrong.logical_and_(targets.ne(ignore_index)));
  TORCH_CHECK_INDEX(among.numel() == 0, "targets: expected classes from 0 to V - 1 = ", classes - 1,
                    ", or ignore_index ", ignore_index, ", got ",
                    among.numel() == 0 ? 0 : among[0].item<int64_t>());
}

void product_cpu(const at::Tensor& to, const at::Tensor& left, const at::Tensor& right, bool add) {
  at::Tensor result = to;
  add ? at::addmm_out(result, to, left, right) : at::mm_out(result, left, right);
}

LossesAndGradients linear_cross_entropy_losses_cpu(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& grad_losses,
    const TokenLossOptions& options, std::array<bool, 3> wanted) {
  at::Tensor memory;  // float32 gradients of 16-bit logits; the first chunk is the longest
  const auto step = [&](const at::Tensor& logits, const at::Tensor& of_chunk,
                        const std::optional<at::Tensor>& grads, const at::Tensor& losses,
                        bool gradients) {
    constexpr int64_t kEntriesPerThread = 32768;  // fewer are not worth another thread
    const int64_t tokens = logits.size(0), classes = logits.size(1), stride = logits.stride(0);
    check_classes(of_chunk, classes, options.ignore_index);
    at::Tensor dx = logits;
    if (gradients && logits.scalar_type() != losses.scalar_type()) {
      if (!memory.defined()) {
        memory = cpu::recycled_output({tokens, stride}, losses.scalar_type());
      }
      dx = memory.narrow(0, 0, tokens).narrow(1, 0, classes);
    }
    const at::Tensor contiguous_targets = of_chunk.contiguous();
    const at::Tensor factors = grads ? grads->contiguous() : at::Tensor();
    const cpu::TokenLosses args{classes,
                                logits.const_data_ptr(),
                                stride,
                                contiguous_targets.const_data_ptr<int64_t>(),
                                grads ? factors.const_data_ptr() : nullptr,
                                losses.mutable_data_ptr(),
                                gradients ? dx.mutable_data_ptr() : nullptr,
                                options.ignore_index,
                                options.label_smoothing,
                                options.z_loss};
    const auto kernel = token_losses_kernels().of[cpu_kernel_dtype(logits.scalar_type())];
    at::parallel_for(0, tokens, std::max<int64_t>(1, kEntriesPerThread / classes),
                     [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    return dx;
  };
  return losses_in_chunks(hidden, weight, targets, bias, grad_losses, options, wanted, kMostBytes,
                          product_cpu, step);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("linear_cross_entropy_losses", flat<linear_cross_entropy_losses_cpu>);
}

}  // namespace muddformer::detail
