// Lists of tensors as the aggregation's ops and kernels take them, on every device.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "norms.h"

namespace muddformer::detail {

// An entry of a list, nothing where that is too short.
inline std::optional<at::Tensor> entry(const OptionalTensors& tensors, size_t i) {
  if (i >= tensors.size()) return std::nullopt;
  std::optional<at::Tensor> tensor = tensors.get(i);
  return tensor.has_value() && tensor->defined() ? tensor : std::nullopt;
}

// Between the rows of a tensor [..., D]; nothing if that is more than one stride, or a row is not
// contiguous. A single row has that of contiguous ones.
inline std::optional<int64_t> row_stride(const at::Tensor& tensor) {
  const at::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  int64_t stride = sizes.back(), outer = -1;
  if (strides.back() != 1 && stride > 1) return std::nullopt;
  for (size_t d = sizes.size() - 1; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (outer == -1) {
      stride = strides[d];
    } else if (strides[d] != outer) {
      return std::nullopt;
    }
    outer = strides[d] * sizes[d];
  }
  return stride;
}

// Tensors [..., D] as rows [D], and what the kernels need to know of them: without views, which
// take longer to make than to read. The tensors have to outlive it. The dispatcher gives kernels
// tensors whose sign is a bit (of the imaginary part of a conjugate) in lists of optional ones.
class Rows {
 public:
  void reserve(size_t count) {
    pointers_.reserve(count);
    strides_.reserve(count);
  }
  void push_back(const at::Tensor& tensor) {
    const std::optional<int64_t> stride = row_stride(tensor);
    stride && !tensor.is_neg() ? add(tensor, *stride) : add_copy(tensor);
  }
  // Copied if the rows do not follow one another.
  void push_back_contiguous(const at::Tensor& tensor) {
    tensor.is_contiguous() && !tensor.is_neg() ? add(tensor, tensor.size(-1)) : add_copy(tensor);
  }
  void push_back_none() {
    pointers_.push_back(nullptr);
    strides_.push_back(0);
  }
  void* const* pointers() const { return pointers_.data(); }
  const int64_t* strides() const { return strides_.data(); }

 private:
  void add(const at::Tensor& tensor, int64_t stride) {
    pointers_.push_back(tensor.data_ptr());
    strides_.push_back(stride);
  }
  void add_copy(const at::Tensor& tensor) {
    copies_.push_back(tensor.resolve_neg().contiguous());
    add(copies_.back(), tensor.size(-1));
  }

  std::vector<at::Tensor> copies_;
  std::vector<void*> pointers_;
  std::vector<int64_t> strides_;
};

// After `none` entries without a tensor.
inline Rows rows_of(at::TensorList tensors, int64_t none = 0) {
  Rows rows;
  rows.reserve(none + tensors.size());
  for (int64_t j = 0; j < none; ++j) rows.push_back_none();
  for (const at::Tensor& tensor : tensors) rows.push_back(tensor);
  return rows;
}

inline Rows rows_of(const OptionalTensors& tensors, size_t count, bool contiguous = false) {
  Rows rows;
  rows.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const std::optional<at::Tensor> tensor = entry(tensors, i);
    if (!tensor) {
      rows.push_back_none();
    } else if (contiguous) {
      rows.push_back_contiguous(*tensor);
    } else {
      rows.push_back(*tensor);
    }
  }
  return rows;
}

// The same with rows that follow one another.
inline Rows contiguous_rows_of(const OptionalTensors& tensors, size_t count) {
  return rows_of(tensors, count, /*contiguous=*/true);
}

// Undefined tensors as none, as the dispatcher knows them.
inline OptionalTensors optional_tensors(at::TensorList tensors) {
  OptionalTensors list;
  list.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    list.push_back(tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt);
  }
  return list;
}

}  // namespace muddformer::detail
