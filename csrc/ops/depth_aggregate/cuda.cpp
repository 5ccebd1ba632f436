// The aggregation on CUDA: host side of csrc/kernels/depth_aggregate.
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/depth_aggregate/depth_aggregate.h"
#include "../common/launch_arguments.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

void check_limits(int64_t sources, int64_t ways) {
  TORCH_CHECK_VALUE(sources <= kernels::kMaxSources, "hiddens: expected at most ",
                    kernels::kMaxSources, " hidden states on CUDA, got ", sources);
  TORCH_CHECK_VALUE(ways <= kernels::kMaxWays, "weights: expected at most ", kernels::kMaxWays,
                    " ways on CUDA, got ", ways);
}

std::vector<at::Tensor> depth_aggregate_cuda(at::TensorList hiddens, const at::Tensor& weights) {
  check_depth_aggregate(hiddens, weights);
  const at::Tensor& like = hiddens[0];
  const int64_t sources = weights.size(-1), ways = weights.size(-2), width = like.size(-1);
  check_limits(sources, ways);
  const c10::cuda::CUDAGuard device_guard(like.device());
  std::vector<at::Tensor> outputs = empty_outputs(ways, like);
  if (like.numel() == 0) return outputs;
  const int64_t tokens = like.numel() / width;
  const Rows x = rows_of(hiddens), y = rows_of(outputs);
  const TokenBlocks w(weights, tokens);
  kernels::AggregateForward args;
  set_inputs(args, x, like, w);
  args.y = y.pointers();
  C10_CUDA_CHECK(kernels::launch_aggregate_forward(args, c10::cuda::getCurrentCUDAStream()));
  return outputs;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward_cuda(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, int64_t deferred) {
  check_depth_aggregate_backward(grad_outputs, grad_hiddens, hiddens, weights, deferred);
  const at::Tensor& like = hiddens[0];
  const int64_t sources = weights.size(-1), ways = weights.size(-2), width = like.size(-1);
  check_limits(sources, ways);
  const c10::cuda::CUDAGuard device_guard(like.device());
  std::vector<at::Tensor> grads = empty_outputs(sources - deferred, like);
  if (like.numel() == 0) return {std::move(grads), at::zeros(weights.sizes(), weights.options())};
  at::Tensor grad_weights = empty_cuda(weights.sizes(), weights.options());
  const int64_t tokens = like.numel() / width;
  const Rows x = rows_of(hiddens), dx = rows_of(grads, deferred);
  const Rows dy = contiguous_rows_of(grad_outputs, ways);
  const Rows incoming = contiguous_rows_of(grad_hiddens, sources);
  const TokenBlocks w(weights, tokens);
  kernels::AggregateBackward args;
  set_inputs(args, x, like, w);
  args.dy = dy.pointers();
  args.grad_in = incoming.pointers();
  args.grad_out = dx.pointers();
  args.dw = grad_weights.data_ptr();
  C10_CUDA_CHECK(kernels::launch_aggregate_backward(args, c10::cuda::getCurrentCUDAStream()));
  return {std::move(grads), std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("depth_aggregate", depth_aggregate_cuda);
  m.impl("depth_aggregate_backward", depth_aggregate_backward_cuda);
}

}  // namespace muddformer::detail
