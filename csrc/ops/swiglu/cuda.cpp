// SwiGLU's product on CUDA: host side of csrc/kernels/swiglu. float64 and what is too large for the
// kernel go through the composition.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/swiglu/swiglu.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

// The arguments of the forward; rows keeps what they point to.
kernels::Swiglu arguments(const GateAndUp& given, Rows& rows) {
  const int64_t width = given.gate.size(-1);
  rows.push_back(given.gate);
  rows.push_back(given.up);
  return {kernel_dtype(given.gate.scalar_type()),
          width == 0 ? 0 : given.gate.numel() / width,
          width,
          rows.pointers()[0],
          rows.strides()[0],
          rows.pointers()[1],
          rows.strides()[1],
          nullptr};
}

at::Tensor swiglu_cuda(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  check_swiglu(gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  if (gate.scalar_type() == at::kDouble) return swiglu_composition(gate, up);
  const GateAndUp given = gate_and_up(gate, up);
  const at::Tensor out = empty_cuda(given.gate.sizes(), gate.options());
  Rows rows;
  kernels::Swiglu args = arguments(given, rows);
  args.out = out.mutable_data_ptr();
  const cudaError_t error = kernels::launch_swiglu(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) return swiglu_composition(gate, up);
  C10_CUDA_CHECK(error);
  return out;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward_cuda(const at::Tensor& grad,
                                                        const at::Tensor& gate,
                                                        const std::optional<at::Tensor>& up) {
  check_swiglu_backward(grad, gate, up);
  const c10::cuda::CUDAGuard device_guard(gate.device());
  if (gate.scalar_type() == at::kDouble) return swiglu_backward_composition(grad, gate, up);
  const at::Tensor grad_gate = empty_cuda(gate.sizes(), gate.options());
  const at::Tensor grad_up =
      up.has_value() ? empty_cuda(gate.sizes(), gate.options()) : empty_cuda({0}, gate.options());
  const GateAndUp grads =
      up.has_value() ? GateAndUp{grad_gate, grad_up} : gate_and_up(grad_gate, up);
  Rows rows;
  kernels::SwigluBackward args{};
  args.forward = arguments(gate_and_up(gate, up), rows);
  rows.push_back(grad);
  args.grad = rows.pointers()[2];
  args.grad_stride = rows.strides()[2];
  args.grad_gate = grads.gate.mutable_data_ptr();
  args.grad_up = grads.up.mutable_data_ptr();
  args.grads_stride = gate.size(-1);
  const cudaError_t error =
      kernels::launch_swiglu_backward(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) return swiglu_backward_composition(grad, gate, up);
  C10_CUDA_CHECK(error);
  return {grad_gate, grad_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("swiglu", swiglu_cuda);
  m.impl("swiglu_backward", swiglu_backward_cuda);
}

}  // namespace muddformer::detail
