// Head, loss and gradients chunk by chunk: the loop that all backends share. What differs is the
// step from logits to losses.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {

// Tokens of a chunk: chunks are about equally long, and their logits have at most so many bytes,
// where that leaves tokens enough to keep the products efficient.
inline int64_t chunk_length(int64_t tokens, int64_t token_bytes, int64_t most_bytes) {
  constexpr int64_t kLeast = 256, kMultiple = 128;
  const int64_t most = std::max(most_bytes / token_bytes, kLeast);
  const int64_t chunks = std::max<int64_t>((tokens + most - 1) / most, 1);
  const int64_t length = (tokens + chunks - 1) / chunks;
  return (length + kMultiple - 1) / kMultiple * kMultiple;
}

// to = left right, or to += left right; left and right have one dtype, perhaps narrower than to.
using Product = void (*)(const at::Tensor& to, const at::Tensor& left, const at::Tensor& right,
                         bool add);

// The step: `step(logits [n, V], targets [n], grad_losses [n] or none, losses [n], gradients)`
// writes the losses. Where the gradients are wanted it returns those of the logits, in their place
// or in memory that the next step may take, of the logits' dtype or wider.
template <typename Step>
LossesAndGradients losses_in_chunks(const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& targets,
                                    const std::optional<at::Tensor>& bias,
                                    const std::optional<at::Tensor>& grad_losses,
                                    const TokenLossOptions& options, std::array<bool, 3> wanted,
                                    int64_t most_bytes, Product product, const Step& step) {
  check_losses(hidden, weight, targets, bias, grad_losses, options, wanted);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const int64_t tokens = targets.numel(), classes = weight.size(0), width = hidden.size(-1);
  const at::TensorOptions own = hidden.options();
  const at::TensorOptions wide = own.dtype(accumulation_dtype(hidden.scalar_type()));
  const at::Tensor rows = hidden.reshape({tokens, width}), head = weight.to(own.dtype());
  const at::Tensor flat_targets = targets.reshape({tokens}).to(at::kLong);
  const std::optional<at::Tensor> flat_grads =
      grad_losses ? std::optional(grad_losses->reshape({tokens})) : std::nullopt;
  const std::optional<at::Tensor> offset =
      bias ? std::optional(bias->to(own.dtype())) : std::nullopt;

  at::Tensor losses = at::empty({tokens}, wide);
  const auto gradient = [&](bool is_wanted, at::IntArrayRef shape) {
    if (!is_wanted) return at::empty({0}, wide);
    return tokens == 0 ? at::zeros(shape, wide) : at::empty(shape, wide);
  };
  at::Tensor grad_hidden = gradient(wanted[0], {tokens, width});
  const at::Tensor grad_weight = gradient(wanted[1], weight.sizes());
  const at::Tensor grad_bias = wanted[2] ? at::zeros({classes}, wide) : at::empty({0}, wide);
  const bool gradients = wanted[0] || wanted[1] || wanted[2];

  // Rows of logits begin at multiples of 16 bytes, whatever V is.
  const int64_t padded = (classes + 7) / 8 * 8;
  const int64_t length = std::min(tokens, options.chunk.value_or(chunk_length(
                                              tokens, padded * hidden.element_size(), most_bytes)));
  const at::Tensor memory = at::empty({length, padded}, own);
  at::Tensor head_beside_dx = head;
  for (int64_t first = 0; first < tokens; first += length) {
    const int64_t count = std::min(length, tokens - first);
    const at::Tensor x = rows.narrow(0, first, count);
    at::Tensor logits = memory.narrow(0, 0, count).narrow(1, 0, classes);
    offset ? at::addmm_out(logits, *offset, x, head.t()) : at::mm_out(logits, x, head.t());
    const at::Tensor dx =
        step(logits, flat_targets.narrow(0, first, count),
             flat_grads ? std::optional(flat_grads->narrow(0, first, count)) : std::nullopt,
             losses.narrow(0, first, count), gradients);
    if (wanted[0]) {
      head_beside_dx = head_beside_dx.to(dx.scalar_type());  // cast once
      product(grad_hidden.narrow(0, first, count), dx, head_beside_dx, /*add=*/false);
    }
    if (wanted[1]) product(grad_weight, dx.t(), x.to(dx.scalar_type()), /*add=*/first > 0);
    if (wanted[2]) grad_bias.add_(at::sum(dx, 0, /*keepdim=*/false, wide.dtype().toScalarType()));
  }
  if (wanted[0]) grad_hidden = grad_hidden.view(hidden.sizes());
  return {losses.view(targets.sizes()), grad_hidden, grad_weight, grad_bias};
}

}  // namespace muddformer::detail
