// Head and loss on CUDA: products by cuBLAS and cuBLASLt, in between the kernel of
// csrc/kernels/linear_cross_entropy. float64 goes through the composition.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/linear_cross_entropy/linear_cross_entropy.h"
#include "../common/matmul.h"
#include "chunks.h"

namespace muddformer::detail {
namespace {

// Of logits in memory. Shorter chunks save memory but read and write the gradient of the head more
// often: at 50304 classes of 16 bits this is 5,000 tokens, whose products take ten times as long as
// that.
constexpr int64_t kMostBytes = int64_t{512} << 20;

// The step out of PyTorch's own, for float64.
void loss_step_composition(const at::Tensor& logits, const at::Tensor& targets,
                           const std::optional<at::Tensor>& grad_losses, const at::Tensor& losses,
                           bool gradients, const TokenLossOptions& options) {
  const double smoothing = options.label_smoothing, classes = static_cast<double>(logits.size(1));
  const at::Tensor counts = targets.ne(options.ignore_index);
  const at::Tensor classes_of = targets.where(counts, 0).unsqueeze(1);
  at::Tensor p = at::log_softmax(logits, 1, losses.scalar_type());
  at::Tensor loss = p.gather(1, classes_of).squeeze(1).mul_(smoothing - 1);
  if (smoothing > 0) loss.sub_(p.mean(1), smoothing);
  at::Tensor scale;  // of the probabilities in the gradient
  if (options.z_loss > 0) {
    const at::Tensor lse = at::logsumexp(logits.to(losses.scalar_type()), 1);
    loss.addcmul_(lse, lse, options.z_loss);
    scale = lse.mul_(2 * options.z_loss).add_(1);
  }
  at::Tensor result = losses;
  result.copy_(loss.masked_fill_(counts.logical_not(), 0));
  if (!gradients) return;
  p.exp_();
  if (scale.defined()) p.mul_(scale.unsqueeze(1));
  if (smoothing > 0) p.sub_(smoothing / classes);
  p.scatter_add_(1, classes_of,
                 at::full({1, 1}, smoothing - 1, p.options()).expand(classes_of.sizes()));
  at::Tensor factor = counts.to(p.scalar_type());
  if (grad_losses) factor.mul_(*grad_losses);
  at::Tensor to = logits;
  at::mul_out(to, p, factor.unsqueeze(1));
}

LossesAndGradients linear_cross_entropy_losses_cuda(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& grad_losses,
    const TokenLossOptions& options, std::array<bool, 3> wanted) {
  const c10::cuda::CUDAGuard device_guard(hidden.device());
  const auto step = [&options](const at::Tensor& logits, const at::Tensor& of_chunk,
                               const std::optional<at::Tensor>& grads, const at::Tensor& losses,
                               bool gradients) {
    if (logits.scalar_type() == at::kDouble) {
      loss_step_composition(logits, of_chunk, grads, losses, gradients, options);
      return logits;
    }
    const at::Tensor classes = of_chunk.contiguous();
    const at::Tensor factors = grads ? grads->contiguous() : at::Tensor();
    C10_CUDA_CHECK(kernels::launch_token_losses(
        {kernel_dtype(logits.scalar_type()), logits.size(0), logits.size(1), logits.stride(0),
         logits.mutable_data_ptr(), classes.const_data_ptr<int64_t>(),
         grads ? factors.const_data_ptr<float>() : nullptr, losses.mutable_data_ptr<float>(),
         options.ignore_index, static_cast<float>(options.label_smoothing),
         static_cast<float>(options.z_loss), gradients},
        c10::cuda::getCurrentCUDAStream()));
    return logits;
  };
  return losses_in_chunks(hidden, weight, targets, bias, grad_losses, options, wanted, kMostBytes,
                          matmul_out, step);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("linear_cross_entropy_losses", flat<linear_cross_entropy_losses_cuda>);
}

}  // namespace muddformer::detail
