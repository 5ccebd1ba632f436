// A linear layer on CUDA. cuBLASLt where it saves a pass: the residual in the product's epilogue,
// gradients of a float32 weight straight from 16 bits, the bias's gradient on the way. All else is
// PyTorch's own product, which is as fast.
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "../common/matmul.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

// The longest sum of a weight's gradient that cuBLAS is asked for. Above 2^21 tokens, of a number
// that is no multiple of 8, its result is wrong (cuBLAS of CUDA 13.0, H200: by 0.26 of the norm for
// 2101251 tokens, in PyTorch's own product too).
constexpr int64_t kMaxSum = int64_t{1} << 20;

// g^T rows, of [tokens, out] and [tokens, in], in parts of so many tokens.
void weight_gradient_out(const at::Tensor& to, const at::Tensor& g, const at::Tensor& rows) {
  const int64_t tokens = rows.size(0);
  for (int64_t begin = 0; begin < tokens; begin += kMaxSum) {
    const int64_t count = std::min(kMaxSum, tokens - begin);
    matmul_out(to, g.narrow(0, begin, count).t(), rows.narrow(0, begin, count),
               /*add=*/begin > 0);
  }
}

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
  const int64_t tokens = weight.size(1) == 0 ? 0 : x.numel() / weight.size(1);
  if ((dtype == x.scalar_type() && tokens <= kMaxSum) || x.numel() == 0) {
    return linear_backward_composition(grad, x, weight, dtype, wanted);
  }
  const at::Tensor g = matrix_of(grad), rows = matrix_of(x);
  auto [dx, dw, db] =
      linear_backward_composition(g, rows, weight, dtype, {wanted[0], false, wanted[2]});
  if (wanted[0]) dx = dx.view(x.sizes());
  if (wanted[1]) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const bool halves = dtype == at::kBFloat16 || dtype == at::kHalf;
    dw = empty_cuda(weight.sizes(), x.options().dtype(halves ? at::kFloat : dtype));
    weight_gradient_out(dw, g, rows);
    if (halves) dw = dw.to(dtype);
  }
  return {dx, dw, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("linear_forward", linear_forward_cuda);
  m.impl("linear_backward", linear_backward_cuda);
}

}  // namespace muddformer::detail
