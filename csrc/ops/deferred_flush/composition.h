// deferred_flush out of PyTorch's elementwise steps: what the CPU runs, and CUDA where the kernel
// cannot.
#pragma once

#include <ATen/ATen.h>

#include "../common/checks.h"
#include "deferred_flush.h"

namespace muddformer {

inline std::vector<at::Tensor> deferred_flush_composition(
    const c10::List<std::optional<at::Tensor>>& grad_hiddens,
    const c10::List<std::optional<at::Tensor>>& grad_sums, at::TensorList weights,
    const at::Tensor& like) {
  const at::ScalarType dtype = like.scalar_type(), wide = accumulation_dtype(dtype);
  std::vector<at::Tensor> sums;
  for (size_t j = 0; j < grad_hiddens.size(); ++j) {
    const at::Tensor grad = grad_hiddens.get(j).value_or(at::Tensor());
    sums.push_back(at::zeros(like.sizes(), like.options().dtype(wide)));
    if (grad.defined()) sums.back().copy_(grad);
  }
  size_t factor = 0;
  for (const at::Tensor& layer : weights) {
    const at::Tensor w = layer.to(wide);
    for (int64_t c = 0; c < layer.size(-2); ++c, ++factor) {
      const at::Tensor given = grad_sums.get(factor).value_or(at::Tensor());
      if (!given.defined()) continue;
      const at::Tensor dv = given.to(wide);
      for (size_t j = 0; j < sums.size(); ++j) {
        const auto source = static_cast<int64_t>(j);
        sums[j].addcmul_(w.select(-2, c).select(-1, source).unsqueeze(-1), dv);
      }
    }
  }
  for (at::Tensor& sum : sums) sum = sum.to(dtype);
  return sums;
}

}  // namespace muddformer
