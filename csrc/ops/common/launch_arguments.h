// What the launches of operators on CUDA are given, out of tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
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

// at::empty() without its way through the dispatcher, which takes as long as the allocation.
inline at::Tensor empty_cuda(at::IntArrayRef sizes, const at::TensorOptions& options) {
  return at::Tensor(at::detail::empty_cuda(sizes, options));
}

inline std::vector<at::Tensor> empty_outputs(int64_t count, const at::Tensor& like) {
  std::vector<at::Tensor> outputs;
  outputs.reserve(count);
  for (int64_t i = 0; i < count; ++i) outputs.push_back(empty_cuda(like.sizes(), like.options()));
  return outputs;
}

// Weights [..., C, S] with the block of a token contiguous, block after block; one block for all
// tokens stays one block.
struct TokenBlocks {
  TokenBlocks(const at::Tensor& weights, int64_t token_count)
      : tensor(weights),
        tokens(token_count),
        ways(weights.size(-2)),
        sources(weights.size(-1)),
        stride(ways * sources) {
    if (weights.is_contiguous()) return;
    tensor = weights.reshape({tokens, ways, sources});
    const bool contiguous = tensor.select(0, 0).is_contiguous();
    if (contiguous && tensor.stride(0) == 0) {
      stride = 0;
    } else if (!contiguous || (tensor.stride(0) != stride && tokens != 1)) {
      tensor = tensor.contiguous();
    }
  }
  const void* data() const { return tensor.const_data_ptr(); }

  at::Tensor tensor;
  int64_t tokens, ways, sources, stride;
};

// What forward and backward read alike: the sources, of the shape of `like`, and the weights.
template <typename Args>
void set_inputs(Args& args, const Rows& x, const at::Tensor& like, const TokenBlocks& weights) {
  args.dtype = kernel_dtype(like.scalar_type());
  args.tokens = weights.tokens;
  args.dim = like.size(-1);
  args.sources = static_cast<int>(weights.sources);
  args.ways = static_cast<int>(weights.ways);
  args.x = x.pointers();
  args.x_stride = x.strides();
  args.w = weights.data();
  args.w_stride = weights.stride;
}

}  // namespace muddformer::detail
