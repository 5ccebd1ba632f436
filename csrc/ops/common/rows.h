// Lists of tensors as the aggregation's ops and kernels take them, on every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

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

// Tensors [..., D] as [tokens, D] with contiguous rows, and what the kernels need to know of them.
class Rows {
 public:
  void reserve(size_t count) {
    tensors_.reserve(count);
    pointers_.reserve(count);
    strides_.reserve(count);
  }
  void push_back(const at::Tensor& tensor) {
    const int64_t width = tensor.size(-1);
    at::Tensor rows = tensor.reshape({width == 0 ? 0 : tensor.numel() / width, width});
    if (rows.stride(1) != 1 && width > 1) rows = rows.contiguous();
    pointers_.push_back(rows.data_ptr());
    strides_.push_back(rows.stride(0));
    tensors_.push_back(std::move(rows));
  }
  void push_back_none() {
    pointers_.push_back(nullptr);
    strides_.push_back(0);
  }
  void* const* pointers() const { return pointers_.data(); }
  const int64_t* strides() const { return strides_.data(); }

 private:
  std::vector<at::Tensor> tensors_;
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

inline Rows rows_of(const OptionalTensors& tensors, size_t count) {
  Rows rows;
  rows.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    if (const std::optional<at::Tensor> tensor = entry(tensors, i)) {
      rows.push_back(*tensor);
    } else {
      rows.push_back_none();
    }
  }
  return rows;
}

// The same with rows that follow one another.
inline Rows contiguous_rows_of(const OptionalTensors& tensors, size_t count) {
  OptionalTensors contiguous;
  contiguous.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const std::optional<at::Tensor> tensor = entry(tensors, i);
    contiguous.push_back(tensor ? std::optional(tensor->contiguous()) : std::nullopt);
  }
  return rows_of(contiguous, count);
}

// The first `count` tensors without autograd's edges: their gradients are deferred, and an edge
// that never brings one is more than compiled autograd can add up.
inline std::vector<at::Tensor> without_edges(at::TensorList tensors, int64_t count) {
  std::vector<at::Tensor> result = tensors.vec();
  for (int64_t j = 0; j < count; ++j) result[j] = result[j].detach();
  return result;
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

inline std::vector<at::Tensor> empty_outputs(int64_t count, const at::Tensor& like) {
  std::vector<at::Tensor> outputs;
  outputs.reserve(count);
  for (int64_t i = 0; i < count; ++i) outputs.push_back(at::empty(like.sizes(), like.options()));
  return outputs;
}

}  // namespace muddformer::detail
