// deferred_flush out of PyTorch's elementwise steps: what the CPU runs, and CUDA where the kernel
// cannot.
#pragma once

#include <ATen/ATen.h>

#include "../common/checks.h"
#include "../common/rows.h"
#include "internal.h"

namespace muddformer::detail {

inline std::vector<at::Tensor> deferred_flush_composition(const OptionalTensors& grad_hiddens,
                                                          const OptionalTensors& grad_sums,
                                                          at::TensorList weights,
                                                          const at::Tensor& like) {
  const at::ScalarType dtype = like.scalar_type(), wide = accumulation_dtype(dtype);
  std::vector<at::Tensor> sums;
  for (size_t j = 0; j < grad_hiddens.size(); ++j) {
    sums.push_back(at::zeros(like.sizes(), like.options().dtype(wide)));
    if (const auto grad = entry(grad_hiddens, j)) sums.back().copy_(*grad);
  }
  size_t factor = 0;
  for (const at::Tensor& layer : weights) {
    const at::Tensor w = layer.to(wide);
    for (int64_t c = 0; c < layer.size(-2); ++c, ++factor) {
      const std::optional<at::Tensor> given = entry(grad_sums, factor);
      if (!given.has_value()) continue;
      const at::Tensor dv = given->to(wide);
      for (size_t j = 0; j < sums.size(); ++j) {
        const auto source = static_cast<int64_t>(j);
        sums[j].addcmul_(w.select(-2, c).select(-1, source).unsqueeze(-1), dv);
      }
    }
  }
  for (at::Tensor& sum : sums) sum = sum.to(dtype);
  return sums;
}

}  // namespace muddformer::detail
