// A linear layer out of PyTorch's steps: what the CPU runs, and CUDA where cuBLASLt has nothing to
// add.
#pragma once

#include <ATen/ATen.h>

#include "internal.h"

namespace muddformer::detail {

inline at::Tensor linear_composition(const at::Tensor& x, const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const std::optional<at::Tensor>& residual) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor y = at::linear(x, weight, bias);
  return (residual ? at::add(*residual, y) : y).contiguous();
}

// [..., width] as [tokens, width].
inline at::Tensor matrix_of(const at::Tensor& tensor) {
  const int64_t width = tensor.size(-1);
  return tensor.reshape({tensor.numel() / width, width});
}

inline LinearGradients linear_backward_composition(const at::Tensor& grad, const at::Tensor& x,
                                                   const at::Tensor& weight, at::ScalarType dtype,
                                                   std::array<bool, 3> wanted) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor g = matrix_of(grad), rows = matrix_of(x);
  const at::TensorOptions given = x.options().dtype(dtype);
  return {wanted[0] ? g.mm(weight).view(x.sizes()) : at::empty({0}, x.options()),
          wanted[1] ? g.t().mm(rows).to(dtype) : at::empty({0}, given),
          wanted[2] ? at::sum(g, 0, /*keepdim=*/false, dtype) : at::empty({0}, given)};
}

}  // namespace muddformer::detail
