// Results as meta kernels give them: shapes, which may be symbolic, and dtypes alone.
#pragma once

#include <ATen/ops/empty.h>

#include <vector>

#include "norms.h"
#include "rows.h"

namespace muddformer::detail {

inline at::Tensor empty_of(const at::Tensor& tensor) {
  return at::empty_symint(tensor.sym_sizes(), tensor.options());
}

inline std::vector<at::Tensor> empty_of_each(int64_t count, const at::Tensor& like) {
  std::vector<at::Tensor> result;
  result.reserve(count);
  for (int64_t i = 0; i < count; ++i) result.push_back(empty_of(like));
  return result;
}

// What stands for a tensor that is not there.
inline at::Tensor empty_none(const at::Tensor& like) {
  return at::empty({0}, like.options());
}

inline at::Tensor empty_of(const std::optional<at::Tensor>& tensor, const at::Tensor& like) {
  return tensor.has_value() ? empty_of(*tensor) : empty_none(like);
}

}  // namespace muddformer::detail
