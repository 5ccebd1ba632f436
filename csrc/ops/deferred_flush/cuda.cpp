// Deferred gradients on CUDA: host side of csrc/kernels/deferred_flush, and the composition for
// what the kernel cannot do.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/deferred_flush/deferred_flush.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

std::vector<at::Tensor> deferred_flush_cuda(const OptionalTensors& grad_hiddens,
                                            const OptionalTensors& grad_sums,
                                            at::TensorList weights) {
  const at::Tensor like = check_deferred_flush(grad_hiddens, grad_sums, weights);
  const c10::cuda::CUDAGuard device_guard(like.device());
  const auto sources = static_cast<int64_t>(grad_hiddens.size());
  const bool narrow = like.scalar_type() == at::kBFloat16 || like.scalar_type() == at::kHalf;
  if (!narrow || like.numel() == 0) {
    return deferred_flush_composition(grad_hiddens, grad_sums, weights, like);
  }
  std::vector<at::Tensor> grads = empty_outputs(sources, like);
  const int64_t tokens = like.numel() / like.size(-1), element = like.element_size();
  const Rows given = contiguous_rows_of(grad_sums, grad_sums.size());
  const Rows incoming = contiguous_rows_of(grad_hiddens, sources), dx = rows_of(grads);
  std::vector<TokenBlocks> blocks;  // keeps the weights' copies, where there are any
  std::vector<const void*> factors, ways;
  std::vector<int64_t> strides;
  size_t factor = 0;
  for (const at::Tensor& layer : weights) {
    const TokenBlocks& block = blocks.emplace_back(layer, tokens);
    for (int64_t c = 0; c < block.ways; ++c, ++factor) {
      if (given.pointers()[factor] == nullptr) continue;
      factors.push_back(given.pointers()[factor]);
      ways.push_back(static_cast<const char*>(block.data()) + c * block.sources * element);
      strides.push_back(block.stride);
    }
  }
  const kernels::DeferredFlush args{kernel_dtype(like.scalar_type()),
                                    tokens,
                                    like.size(-1),
                                    static_cast<int>(sources),
                                    static_cast<int>(factors.size()),
                                    factors.data(),
                                    ways.data(),
                                    strides.data(),
                                    incoming.pointers(),
                                    dx.pointers()};
  const cudaError_t error = kernels::launch_deferred_flush(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) {
    return deferred_flush_composition(grad_hiddens, grad_sums, weights, like);
  }
  C10_CUDA_CHECK(error);
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("deferred_flush", deferred_flush_cuda);
}

}  // namespace muddformer::detail
