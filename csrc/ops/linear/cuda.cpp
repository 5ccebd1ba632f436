// A linear layer on CUDA. cuBLASLt where it saves a pass: the residual in the product's epilogue,
// gradients of a float32 weight straight from 16 bits. All else is PyTorch's own product, which is
// as fast.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "../common/matmul.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

at::Tensor linear_forward_cuda(const at::Tensor& x, const at::Tensor& weight,
                               const std::optional<at::Tensor>& bias,
                               const std::optional<at::Tensor>& residual) {
  check_linear(x, weight, bias, residual, /*casts=*/false);
  const c10::cuda::CUDAGuard device_guard(x.device());
  if (!residual || x.numel() == 0) return linear_composition(x, weight, bias, residual);
  at::Tensor y =
      empty_cuda(residual->sizes(),
                 x.options().dtype(c10::promoteTypes(x.scalar_type(), residual->scalar_type())));
  const at::Tensor rows = matrix_of(x), added = residual->to(y.scalar_type()).contiguous();
  const at::Tensor offset = bias ? bias->contiguous() : at::Tensor();
  std::optional<kernels::Matmul> args = matmul_arguments(matrix_of(y), rows, weight.t());
  if (!args) return linear_composition(x, weight, bias, residual);
  args->c = added.const_data_ptr();
  args->bias = bias ? offset.const_data_ptr() : nullptr;
  if (enqueue_matmul(*args, x.options())) return y;
  return linear_composition(x, weight, bias, residual);
}

LinearGradients linear_backward_cuda(const at::Tensor& grad, const at::Tensor& x,
                                     const at::Tensor& weight, at::ScalarType dtype,
                                     std::array<bool, 3> wanted) {
  check_linear_backward(grad, x, weight, dtype);
  const c10::cuda::CUDAGuard device_guard(x.device());
  if (x.numel() == 0 || (dtype == x.scalar_type() && x.numel() / x.size(-1) <= kMaxMatmulDepth)) {
    return linear_backward_composition(grad, x, weight, dtype, wanted);
  }
  const at::Tensor g = matrix_of(grad), rows = matrix_of(x);
  auto [dx, dw, db] =
      linear_backward_composition(g, rows, weight, dtype, {wanted[0], false, wanted[2]});
  if (wanted[0]) dx = dx.view(x.sizes());
  if (wanted[1]) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const at::Tensor sum = empty_cuda(weight.sizes(), x.options().dtype(accumulation_dtype(dtype)));
    matmul_out(sum, g.t(), rows, /*add=*/false);
    dw = sum.to(dtype);
  }
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("linear_forward", linear_forward_cuda);
  m.impl("linear_backward", linear_backward_cuda);
}

}  // namespace muddformer::detail
