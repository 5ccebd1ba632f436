// Residual addition and norm on CUDA: host side of csrc/kernels/add_norm. What the kernels do not
// take (float64, very wide rows, dtypes that go together in no model) goes through the composition.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/add_norm/add_norm.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

kernels::AddNormTypes types_of(at::ScalarType x, const at::Tensor& sum, at::ScalarType normed,
                               const at::Tensor& weight) {
  return {kernel_dtype(x), kernel_dtype(sum.scalar_type()), kernel_dtype(normed),
          weight.scalar_type() == at::kFloat};
}

AddNormForward add_norm_forward_cuda(const at::Tensor& x, const at::Tensor& residual,
                                     const at::Tensor& weight,
                                     const std::optional<at::Tensor>& bias,
                                     const AddNormOptions& options) {
  check_add_norm(x, residual, weight, bias, options);
  const c10::cuda::CUDAGuard device_guard(residual.device());
  const at::ScalarType normed_dtype = options.dtype.value_or(residual.scalar_type());
  const at::IntArrayRef leading = residual.sizes().slice(0, residual.dim() - 1);
  const at::TensorOptions wide = residual.options().dtype(at::kFloat);
  const bool layer = options.norm == "layer";
  const at::Tensor sum = empty_cuda(residual.sizes(), residual.options());
  const at::Tensor normed = empty_cuda(residual.sizes(), wide.dtype(normed_dtype));
  const at::Tensor rstd = empty_cuda(leading, wide);
  const at::Tensor mean = layer ? empty_cuda(leading, wide) : empty_cuda({0}, wide);
  const at::Tensor own_weight = weight.contiguous();
  const at::Tensor own_bias = bias.has_value() ? bias->contiguous() : at::Tensor();
  Rows rows;
  rows.push_back(x);
  rows.push_back(residual);
  const kernels::AddNorm args{types_of(x.scalar_type(), residual, normed_dtype, weight),
                              rstd.numel(),
                              residual.size(-1),
                              layer,
                              static_cast<float>(options.eps),
                              rows.pointers()[0],
                              rows.strides()[0],
                              rows.pointers()[1],
                              rows.strides()[1],
                              own_weight.const_data_ptr(),
                              bias.has_value() ? own_bias.const_data_ptr() : nullptr,
                              sum.mutable_data_ptr(),
                              normed.mutable_data_ptr(),
                              rstd.mutable_data_ptr<float>(),
                              mean.mutable_data_ptr<float>()};
  const cudaError_t error = residual.scalar_type() == at::kDouble
                                ? cudaErrorNotSupported
                                : kernels::launch_add_norm(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) {
    return add_norm_composition(x, residual, weight, bias, options);
  }
  C10_CUDA_CHECK(error);
  return {sum, normed, rstd, mean};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> add_norm_backward_cuda(
    const std::optional<at::Tensor>& grad_sum, const at::Tensor& grad_normed, const at::Tensor& sum,
    const at::Tensor& weight, const at::Tensor& rstd, const at::Tensor& mean, std::string_view norm,
    at::ScalarType x_dtype, std::array<bool, 2> wanted) {
  check_add_norm_backward(grad_sum, grad_normed, sum, weight, rstd, mean, norm, x_dtype, wanted);
  const c10::cuda::CUDAGuard device_guard(sum.device());
  const auto composition = [&] {
    return add_norm_backward_composition(grad_sum, grad_normed, sum, weight, rstd, mean, norm,
                                         x_dtype, wanted);
  };
  if (sum.scalar_type() == at::kDouble || sum.numel() == 0) return composition();
  const at::Tensor own_sum = sum.contiguous(), own_weight = weight.contiguous();
  const at::Tensor own_rstd = rstd.contiguous(), own_mean = mean.contiguous();
  const at::Tensor none = empty_cuda({0}, sum.options());
  const at::Tensor grad_residual = empty_cuda(sum.sizes(), sum.options());
  const bool both = x_dtype != sum.scalar_type();
  const at::Tensor grad_x = both ? empty_cuda(sum.sizes(), sum.options().dtype(x_dtype)) : none;
  const auto of_norm = [&](bool is_wanted) {
    return empty_cuda({is_wanted ? weight.size(0) : 0}, weight.options());
  };
  const at::Tensor grad_weight = of_norm(wanted[0]), grad_bias = of_norm(wanted[1]);
  const auto pointer = [](bool is_there, const at::Tensor& tensor) {
    return is_there ? tensor.mutable_data_ptr() : nullptr;
  };
  Rows rows;
  rows.push_back(grad_normed);
  if (grad_sum.has_value()) {
    rows.push_back(*grad_sum);
  } else {
    rows.push_back_none();
  }
  kernels::AddNormBackward args{types_of(x_dtype, sum, grad_normed.scalar_type(), weight),
                                rstd.numel(),
                                sum.size(-1),
                                norm == "layer",
                                rows.pointers()[1],
                                rows.strides()[1],
                                rows.pointers()[0],
                                rows.strides()[0],
                                own_sum.const_data_ptr(),
                                own_weight.const_data_ptr(),
                                own_rstd.const_data_ptr<float>(),
                                own_mean.const_data_ptr<float>(),
                                grad_residual.mutable_data_ptr(),
                                pointer(both, grad_x),
                                pointer(wanted[0], grad_weight),
                                pointer(wanted[1], grad_bias),
                                nullptr};
  int64_t floats = 0;
  C10_CUDA_CHECK(kernels::add_norm_workspace(args, floats));
  const at::Tensor workspace = empty_cuda({floats}, sum.options().dtype(at::kFloat));
  args.workspace = workspace.mutable_data_ptr<float>();
  const cudaError_t error =
      kernels::launch_add_norm_backward(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) return composition();
  C10_CUDA_CHECK(error);
  return {grad_residual, grad_x, grad_weight, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("add_norm_forward", flat<add_norm_forward_cuda>);
  m.impl("add_norm_backward", add_norm_backward_cuda);
}

}  // namespace muddformer::detail
