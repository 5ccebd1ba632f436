// Norms of heads and rotation on CUDA: host side of csrc/kernels/qk_norm_rotary. What the kernels
// do not take (float64, very wide heads) goes through the composition.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/qk_norm_rotary/qk_norm_rotary.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

at::Tensor with_contiguous_heads(const at::Tensor& x) {
  return x.stride(3) == 1 || x.size(3) == 1 ? x : x.contiguous();
}

// Of [B, T, H, E].
kernels::Heads heads_of(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

at::Tensor empty_heads(const at::Tensor& like) {
  return empty_cuda(like.sizes(), like.options());
}

// What both ways are given; q, k: [B, T, H, E] of the shapes alone. The tables and weights are
// contiguous.
kernels::QkNormRotary arguments(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                                const at::Tensor& sin, const at::Tensor& q_weight,
                                const at::Tensor& k_weight, double eps) {
  kernels::QkNormRotary args{};
  args.dtype = kernel_dtype(q.scalar_type());
  args.wide = q_weight.defined() && q_weight.scalar_type() == at::kFloat;
  args.batch = q.size(0);
  args.tokens = q.size(1);
  args.heads[kernels::kQueries] = static_cast<int>(q.size(2));
  args.heads[kernels::kKeys] = static_cast<int>(k.size(2));
  args.head_dim = static_cast<int>(q.size(3));
  args.half = static_cast<int>(cos.size(-1));
  args.eps = static_cast<float>(eps);
  args.cos = cos.const_data_ptr<float>();
  args.sin = sin.const_data_ptr<float>();
  args.rotary_batch_stride = cos.dim() == 3 && cos.size(0) > 1 ? cos.stride(0) : 0;
  args.rotary_token_stride = cos.stride(-2);
  if (q_weight.defined()) {
    args.weight[kernels::kQueries] = q_weight.const_data_ptr();
    args.weight[kernels::kKeys] = k_weight.const_data_ptr();
  }
  return args;
}

at::Tensor contiguous_or_none(const std::optional<at::Tensor>& tensor) {
  return tensor.has_value() ? tensor->contiguous() : at::Tensor();
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rotary_cuda(const at::Tensor& q, const at::Tensor& k,
                                                       const at::Tensor& cos, const at::Tensor& sin,
                                                       const std::optional<at::Tensor>& q_weight,
                                                       const std::optional<at::Tensor>& k_weight,
                                                       double eps) {
  check_qk_norm_rotary(q, k, cos, sin, q_weight, k_weight, eps);
  const c10::cuda::CUDAGuard device_guard(q.device());
  const at::Tensor own_cos = cos.contiguous(), own_sin = sin.contiguous();
  const at::Tensor own_q_weight = contiguous_or_none(q_weight);
  const at::Tensor own_k_weight = contiguous_or_none(k_weight);
  const at::Tensor from_q = with_contiguous_heads(q), from_k = with_contiguous_heads(k);
  const at::Tensor to_q = empty_heads(q), to_k = empty_heads(k);
  kernels::QkNormRotary args = arguments(q, k, own_cos, own_sin, own_q_weight, own_k_weight, eps);
  args.x[kernels::kQueries] = heads_of(from_q);
  args.x[kernels::kKeys] = heads_of(from_k);
  args.y[kernels::kQueries] = heads_of(to_q);
  args.y[kernels::kKeys] = heads_of(to_k);
  const cudaError_t error =
      q.scalar_type() == at::kDouble
          ? cudaErrorNotSupported
          : kernels::launch_qk_norm_rotary(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) {
    return qk_norm_rotary_composition(q, k, cos, sin, q_weight, k_weight, eps);
  }
  C10_CUDA_CHECK(error);
  return {to_q, to_k};
}

QkGradients qk_norm_rotary_backward_cuda(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                         const std::optional<at::Tensor>& q,
                                         const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                         const at::Tensor& sin,
                                         const std::optional<at::Tensor>& q_weight,
                                         const std::optional<at::Tensor>& k_weight, double eps,
                                         std::array<bool, 2> wanted) {
  check_qk_norm_rotary_backward(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, eps, wanted);
  const c10::cuda::CUDAGuard device_guard(grad_q.device());
  const auto composition = [&] {
    return qk_norm_rotary_backward_composition(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight,
                                               eps, wanted);
  };
  if (grad_q.scalar_type() == at::kDouble || grad_q.numel() == 0) return composition();
  const at::Tensor own_cos = cos.contiguous(), own_sin = sin.contiguous();
  const at::Tensor own_q_weight = contiguous_or_none(q_weight);
  const at::Tensor own_k_weight = contiguous_or_none(k_weight);
  const at::Tensor dy_q = with_contiguous_heads(grad_q);
  const at::Tensor dy_k = with_contiguous_heads(grad_k);
  const at::Tensor dx_q = empty_heads(dy_q), dx_k = empty_heads(dy_k);
  const auto of_weight = [&](bool is_wanted) {
    const at::TensorOptions options = q_weight ? q_weight->options() : grad_q.options();
    return empty_cuda({is_wanted ? grad_q.size(3) : 0}, options);
  };
  const at::Tensor grad_q_weight = of_weight(wanted[0]), grad_k_weight = of_weight(wanted[1]);
  kernels::QkNormRotaryBackward args{};
  args.forward = arguments(dy_q, dy_k, own_cos, own_sin, own_q_weight, own_k_weight, eps);
  at::Tensor x_q, x_k;
  if (q_weight.has_value()) {
    x_q = with_contiguous_heads(*q);
    x_k = with_contiguous_heads(*k);
    args.forward.x[kernels::kQueries] = heads_of(x_q);
    args.forward.x[kernels::kKeys] = heads_of(x_k);
  }
  args.dy[kernels::kQueries] = heads_of(dy_q);
  args.dy[kernels::kKeys] = heads_of(dy_k);
  args.dx[kernels::kQueries] = heads_of(dx_q);
  args.dx[kernels::kKeys] = heads_of(dx_k);
  if (wanted[0]) args.grad_weight[kernels::kQueries] = grad_q_weight.mutable_data_ptr();
  if (wanted[1]) args.grad_weight[kernels::kKeys] = grad_k_weight.mutable_data_ptr();
  int64_t floats = 0;
  C10_CUDA_CHECK(kernels::qk_norm_rotary_workspace(args, floats));
  const at::Tensor workspace = empty_cuda({floats}, grad_q.options().dtype(at::kFloat));
  args.workspace = workspace.mutable_data_ptr<float>();
  const cudaError_t error =
      kernels::launch_qk_norm_rotary_backward(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) return composition();
  C10_CUDA_CHECK(error);
  return {dx_q, dx_k, grad_q_weight, grad_k_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("qk_norm_rotary", qk_norm_rotary_cuda);
  m.impl("qk_norm_rotary_backward", qk_norm_rotary_backward_cuda);
}

}  // namespace muddformer::detail
