#include <torch/library.h>

#include "../common/checks.h"
#include "internal.h"
#include "linear_cross_entropy.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias=None, str "
      "reduction='mean', int ignore_index=-100, float label_smoothing=0.0, float z_loss=0.0, int? "
      "chunk=None) -> Tensor",
      tags);
  m.def(
      "linear_cross_entropy_losses(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
      "Tensor? grad_losses, int ignore_index, float label_smoothing, float z_loss, int? chunk, "
      "bool[3] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}

at::Tensor linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                                const std::string& reduction, const TokenLossOptions& options) {
  static const detail::Operator<at::Tensor(const at::Tensor&, const at::Tensor&, const at::Tensor&,
                                           const std::optional<at::Tensor>&, std::string_view,
                                           const TokenLossOptions&)>
      op("linear_cross_entropy");
  return op(hidden, weight, targets, bias, reduction, options);
}

namespace detail {

LossesAndGradients linear_cross_entropy_losses(const at::Tensor& hidden, const at::Tensor& weight,
                                               const at::Tensor& targets,
                                               const std::optional<at::Tensor>& bias,
                                               const std::optional<at::Tensor>& grad_losses,
                                               const TokenLossOptions& options,
                                               std::array<bool, 3> wanted) {
  static const Operator<decltype(linear_cross_entropy_losses)> op("linear_cross_entropy_losses");
  return op(hidden, weight, targets, bias, grad_losses, options, wanted);
}

static void check_of_head(const at::Tensor& tensor, const char* name, const at::Tensor& hidden) {
  check_defined(tensor, {name});
  TORCH_CHECK_TYPE(
      tensor.scalar_type() == hidden.scalar_type() || tensor.scalar_type() == at::kFloat, name,
      ": expected dtype ", hidden.scalar_type(), " of hidden or Float, got ", tensor.scalar_type());
  check_same_device(tensor, {name}, hidden, "hidden");
}

void check_linear_cross_entropy(const at::Tensor& hidden, const at::Tensor& weight,
                                const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                                const TokenLossOptions& options) {
  check_floating(hidden, {"hidden"});
  TORCH_CHECK_VALUE(hidden.dim() >= 1 && hidden.sym_size(-1) >= 1,
                    "hidden: expected shape [..., D] with D >= 1, got ", hidden.sym_sizes());
  check_of_head(weight, "weight", hidden);
  TORCH_CHECK_VALUE(
      weight.dim() == 2 && weight.sym_size(0) >= 1 && weight.sym_size(1) == hidden.sym_size(-1),
      "weight: expected shape [V, D] with V >= 1 and D = ", hidden.sym_size(-1), " of hidden, got ",
      weight.sym_sizes());
  check_defined(targets, {"targets"});
  TORCH_CHECK_TYPE(targets.scalar_type() == at::kLong || targets.scalar_type() == at::kInt,
                   "targets: expected dtype int64 or int32, got ", targets.scalar_type());
  const auto leading = hidden.sym_sizes().slice(0, hidden.dim() - 1);
  TORCH_CHECK_VALUE(targets.sym_sizes() == leading, "targets: expected shape ", leading,
                    " of hidden without D, got ", targets.sym_sizes());
  check_same_device(targets, {"targets"}, hidden, "hidden");
  if (bias.has_value()) {
    check_of_head(*bias, "bias", hidden);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0),
                      "bias: expected shape [V] with V = ", weight.sym_size(0), " of weight, got ",
                      bias->sym_sizes());
  }
  TORCH_CHECK_VALUE(options.label_smoothing >= 0 && options.label_smoothing <= 1,
                    "label_smoothing: expected a number from 0 to 1, got ",
                    options.label_smoothing);
  check_eps(options.z_loss, "z_loss");
  TORCH_CHECK_VALUE(options.chunk.value_or(1) >= 1,
                    "chunk: expected at least 1 token or None, got ", options.chunk.value_or(1));
}

void check_losses(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                  const std::optional<at::Tensor>& bias,
                  const std::optional<at::Tensor>& grad_losses, const TokenLossOptions& options,
                  std::array<bool, 3> wanted) {
  check_linear_cross_entropy(hidden, weight, targets, bias, options);
  TORCH_CHECK_VALUE(!wanted[2] || bias.has_value(),
                    "wanted: expected no gradient of a bias where there is none, got True");
  if (!grad_losses.has_value()) return;
  const at::ScalarType wide = accumulation_dtype(hidden.scalar_type());
  TORCH_CHECK_TYPE(grad_losses->scalar_type() == wide, "grad_losses: expected dtype ", wide,
                   ", got ", grad_losses->scalar_type());
  check_same_device(*grad_losses, {"grad_losses"}, hidden, "hidden");
  TORCH_CHECK_VALUE(grad_losses->sym_sizes() == targets.sym_sizes(), "grad_losses: expected shape ",
                    targets.sym_sizes(), " of targets, got ", grad_losses->sym_sizes());
}

}  // namespace detail
}  // namespace muddformer
