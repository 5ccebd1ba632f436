// Matrix products of tensors by cuBLASLt (csrc/kernels/common/matmul.h).
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <optional>

#include "../../kernels/common/matmul.h"
#include "launch_arguments.h"

namespace muddformer::detail {

// What cuBLASLt is said to use best on Hopper.
inline constexpr int64_t kMatmulWorkspace = int64_t{32} << 20;

// The longest sums that cuBLAS is asked for. Beyond 2^21 terms, of a number that is no multiple of 8,
// its results are wrong (CUDA 13.0 on an H200: by 0.26 of the norm for 2101251 terms, in PyTorch's
// own product too).
inline constexpr int64_t kMaxMatmulDepth = int64_t{1} << 20;

// A matrix as cuBLASLt takes it.
struct Stored {
  const void* data;
  int64_t stride;
  bool transposed;
};

// nullopt for a matrix neither of whose strides is 1.
inline std::optional<Stored> stored(const at::Tensor& matrix) {
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  if ((matrix.stride(1) == 1 || columns == 1) && (matrix.stride(0) >= columns || rows == 1)) {
    return Stored{matrix.const_data_ptr(), rows == 1 ? columns : matrix.stride(0), false};
  }
  if (matrix.stride(0) == 1 && matrix.stride(1) >= rows) {
    return Stored{matrix.const_data_ptr(), matrix.stride(1), true};
  }
  return std::nullopt;
}

// The arguments of to = left right, the epilogue aside; nullopt where cuBLASLt is not to be asked.
// to [rows, columns] has rows of stride 1.
inline std::optional<kernels::Matmul> matmul_arguments(const at::Tensor& to, const at::Tensor& left,
                                                       const at::Tensor& right) {
  const at::ScalarType dtype = left.scalar_type();
  if ((dtype != at::kBFloat16 && dtype != at::kHalf) || right.scalar_type() != dtype ||
      (to.scalar_type() != dtype && to.scalar_type() != at::kFloat) || to.numel() == 0 ||
      left.size(1) == 0) {
    return std::nullopt;
  }
  const std::optional<Stored> a = stored(left), b = stored(right), d = stored(to);
  if (!a || !b || !d || d->transposed) return std::nullopt;
  kernels::Matmul args{};
  args.dtype = kernel_dtype(dtype);
  args.out_dtype = kernel_dtype(to.scalar_type());
  args.rows = to.size(0);
  args.columns = to.size(1);
  args.depth = left.size(1);
  args.a = a->data;
  args.a_stride = a->stride;
  args.a_transposed = a->transposed;
  args.b = b->data;
  args.b_stride = b->stride;
  args.b_transposed = b->transposed;
  args.d = to.mutable_data_ptr();
  args.d_stride = d->stride;
  return args;
}

// Enqueues the product on the current stream of the current device; false where cuBLASLt has no
// algorithm, and nothing is done. The workspace may be reused as soon as this returns: by what
// follows on the stream.
inline bool enqueue_matmul(kernels::Matmul args, const at::TensorOptions& like) {
  const at::Tensor workspace = empty_cuda({kMatmulWorkspace}, like.dtype(at::kByte));
  args.workspace = workspace.mutable_data_ptr();
  args.workspace_bytes = kMatmulWorkspace;
  const cudaError_t error = kernels::launch_matmul(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) return false;
  C10_CUDA_CHECK(error);
  return true;
}

// to = left right, or to += left right. to may be float32 where left and right have 16 bits: then
// nothing is rounded on the way.
inline void matmul_out(const at::Tensor& to, const at::Tensor& left, const at::Tensor& right,
                       bool add) {
  const int64_t depth = left.size(1);
  if (depth > kMaxMatmulDepth) {
    for (int64_t begin = 0; begin < depth; begin += kMaxMatmulDepth) {
      const int64_t count = std::min(kMaxMatmulDepth, depth - begin);
      matmul_out(to, left.narrow(1, begin, count), right.narrow(0, begin, count), add || begin > 0);
    }
    return;
  }
  std::optional<kernels::Matmul> args = matmul_arguments(to, left, right);
  if (args) {
    if (add) args->c = args->d;
    if (enqueue_matmul(*args, to.options())) return;
  }
  at::Tensor result = to;
  if (left.scalar_type() != to.scalar_type()) {
    const at::Tensor made = at::mm(left, right, to.scalar_type());
    add ? result.add_(made) : result.copy_(made);
  } else {
    add ? at::addmm_out(result, to, left, right) : at::mm_out(result, left, right);
  }
}

}  // namespace muddformer::detail
