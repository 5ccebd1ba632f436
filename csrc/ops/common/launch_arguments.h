// What the launches of operators on CUDA are given, out of tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>

#include "../../kernels/common/dtype.h"
#include "checks.h"
#include "rows.h"

namespace muddformer::detail {

inline kernels::DType kernel_dtype(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return kernels::DType::Float64;
    case at::kFloat:
      return kernels::DType::Float32;
    case at::kBFloat16:
      return kernels::DType::BFloat16;
    default:
      return kernels::DType::Float16;
  }
}

// What the kernels say of a dtype on x's device; {} for other dtypes than theirs, and where there
// is no such device: x may be fake.
template <typename Ask>
auto ask_device(const at::Tensor& x, Ask ask) -> decltype(ask(kernels::DType::Float32)) {
  const c10::Device device = x.device();
  if (!is_floating(x.scalar_type()) || device.index() >= c10::cuda::device_count()) return {};
  c10::cuda::OptionalCUDAGuard guard;
  if (device.has_index()) guard.set_device(device);
  return ask(kernel_dtype(x.scalar_type()));
}

// [tokens, C, S] with the block of a token contiguous; one block for all tokens stays one block.
inline at::Tensor token_blocks(const at::Tensor& weights, int64_t tokens) {
  const int64_t ways = weights.size(-2), sources = weights.size(-1);
  at::Tensor blocks = weights.reshape({tokens, ways, sources});
  const bool block_contiguous = blocks.select(0, 0).is_contiguous();
  const bool known_stride = blocks.stride(0) == ways * sources || blocks.stride(0) == 0;
  if (block_contiguous && (known_stride || tokens == 1)) return blocks;
  return blocks.contiguous();
}

// What forward and backward read alike: the sources, of the shape of `like`, and the weights as
// token_blocks().
template <typename Args>
void set_inputs(Args& args, const Rows& x, const at::Tensor& like, const at::Tensor& blocks) {
  args.dtype = kernel_dtype(like.scalar_type());
  args.tokens = blocks.size(0);
  args.dim = like.size(-1);
  args.sources = static_cast<int>(blocks.size(2));
  args.ways = static_cast<int>(blocks.size(1));
  args.x = x.pointers();
  args.x_stride = x.strides();
  args.w = blocks.const_data_ptr();
  args.w_stride = blocks.stride(0) == 0 ? 0 : blocks.size(1) * blocks.size(2);
}

}  // namespace muddformer::detail
