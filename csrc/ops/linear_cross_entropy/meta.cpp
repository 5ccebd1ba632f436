// Shapes and dtypes alone, with symbolic sizes: for FakeTensor, torch.compile and torch.export.
#include "../common/meta.h"

#include <torch/library.h>

#include "../common/checks.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

LossesAndGradients linear_cross_entropy_losses_meta(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
    const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& grad_losses,
    const TokenLossOptions& options, std::array<bool, 3> wanted) {
  check_losses(hidden, weight, targets, bias, grad_losses, options, wanted);
  const at::TensorOptions wide = hidden.options().dtype(accumulation_dtype(hidden.scalar_type()));
  const auto gradient = [&wide](bool is_wanted, const at::Tensor& of) {
    return is_wanted ? at::empty_symint(of.sym_sizes(), wide) : at::empty({0}, wide);
  };
  return {at::empty_symint(targets.sym_sizes(), wide), gradient(wanted[0], hidden),
          gradient(wanted[1], weight), gradient(wanted[2], wanted[2] ? *bias : hidden)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, Meta, m) {
  m.impl("linear_cross_entropy_losses", flat<linear_cross_entropy_losses_meta>);
}

}  // namespace muddformer::detail
