// A linear layer with what belongs to it:
//
//   y = x W^T + b + residual
//
// x is [..., in], W [out, in], b [out], residual and y [..., out]. float64, float32, bfloat16 or
// float16. On CUDA the residual is added in the epilogue of a product of 16 bits; where the result
// has 16 bits too, the product has been rounded to them by then, as by PyTorch's two steps. The
// gradient of a float32 W beside a narrower x comes straight from the narrower operands, without
// having been rounded to 16 bits in between. What PyTorch's own product does as fast is left to it.
// The functions go through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "../../macros.h"

namespace muddformer {

/// y of a linear layer, see above.
///
/// @param x [..., in].
/// @param weight [out, in], of the dtype of x or float32: then it is cast for the product (under
///   autocast once a forward, as autocast does it for all).
/// @param bias [out], likewise; nullopt: none.
/// @param residual [..., out], of the dtype of x or float32; nullopt: none.
/// @return [..., out], of the wider of the dtypes of x and residual.
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                                 const std::optional<at::Tensor>& bias = std::nullopt,
                                 const std::optional<at::Tensor>& residual = std::nullopt);

}  // namespace muddformer
