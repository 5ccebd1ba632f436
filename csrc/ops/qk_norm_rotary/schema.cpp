#include <torch/library.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "qk_norm_rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? q_weight=None, Tensor? "
      "k_weight=None, float eps=1e-06) -> (Tensor, Tensor)",
      tags);
  m.def(
      "qk_norm_rotary_backward(Tensor grad_q, Tensor grad_k, Tensor? q, Tensor? k, Tensor cos, "
      "Tensor sin, Tensor? q_weight, Tensor? k_weight, float eps, bool[2] wanted) -> (Tensor, "
      "Tensor, Tensor, Tensor)",
      tags);
}

std::tuple<at::Tensor, at::Tensor> qk_norm_rotary(const at::Tensor& q, const at::Tensor& k,
                                                  const at::Tensor& cos, const at::Tensor& sin,
                                                  const std::optional<at::Tensor>& q_weight,
                                                  const std::optional<at::Tensor>& k_weight,
                                                  double eps) {
  detail::check_defined(q, {"q"});
  static const detail::Operator<decltype(qk_norm_rotary)> op("qk_norm_rotary");
  return op(q, k, cos, sin, q_weight, k_weight, eps);
}

namespace detail {

QkGradients qk_norm_rotary_backward(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                    const std::optional<at::Tensor>& q,
                                    const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                    const at::Tensor& sin,
                                    const std::optional<at::Tensor>& q_weight,
                                    const std::optional<at::Tensor>& k_weight, double eps,
                                    std::array<bool, 2> wanted) {
  static const Operator<decltype(qk_norm_rotary_backward)> op("qk_norm_rotary_backward");
  return op(grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, eps, wanted);
}

static void check_tables(const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& like,
                         const char* like_name) {
  const c10::SymInt batch = like.sym_size(0), tokens = like.sym_size(1);
  check_defined(cos, {"cos"});
  TORCH_CHECK_TYPE(cos.scalar_type() == at::kFloat, "cos: expected dtype Float, got ",
                   cos.scalar_type());
  check_same_device(cos, {"cos"}, like, like_name);
  TORCH_CHECK_VALUE(
      (cos.dim() == 2 || (cos.dim() == 3 && (cos.sym_size(0) == batch || cos.sym_size(0) == 1))) &&
          cos.sym_size(-2) == tokens && cos.sym_size(-1) * 2 <= like.sym_size(-1),
      "cos: expected shape [T, half], [1, T, half] or [B, T, half] with B = ", batch,
      ", T = ", tokens, " and half <= E / 2, E = ", like.sym_size(-1), " of ", like_name, ", got ",
      cos.sym_sizes());
  check_like(sin, {"sin"}, cos, "cos");
}

static void check_weights(const std::optional<at::Tensor>& q_weight,
                          const std::optional<at::Tensor>& k_weight, const at::Tensor& like,
                          const char* like_name) {
  TORCH_CHECK_VALUE(q_weight.has_value() == k_weight.has_value(), "k_weight: expected ",
                    q_weight ? "a tensor, as q_weight is one" : "None, as q_weight is", ", got ",
                    k_weight ? "a tensor" : "None");
  if (!q_weight.has_value()) return;
  TORCH_CHECK_TYPE(
      q_weight->scalar_type() == like.scalar_type() || q_weight->scalar_type() == at::kFloat,
      "q_weight: expected dtype ", like.scalar_type(), " of ", like_name, " or Float, got ",
      q_weight->scalar_type());
  check_same_device(*q_weight, {"q_weight"}, like, like_name);
  TORCH_CHECK_VALUE(q_weight->dim() == 1 && q_weight->sym_size(0) == like.sym_size(-1),
                    "q_weight: expected shape [E] with E = ", like.sym_size(-1), " of ", like_name,
                    ", got ", q_weight->sym_sizes());
  check_like(*k_weight, {"k_weight"}, *q_weight, "q_weight");
}

// [B, T, H, E]; keys may have another number of heads.
static void check_pair(const at::Tensor& q, const char* q_name, const at::Tensor& k,
                       const char* k_name) {
  check_floating(q, {q_name});
  TORCH_CHECK_VALUE(q.dim() == 4 && q.sym_size(2) >= 1 && q.sym_size(3) >= 1, q_name,
                    ": expected shape [B, T, H, E] with H >= 1 and E >= 1, got ", q.sym_sizes());
  check_same_dtype_device(k, {k_name}, q, q_name);
  TORCH_CHECK_VALUE(k.dim() == 4 && k.sym_size(0) == q.sym_size(0) &&
                        k.sym_size(1) == q.sym_size(1) && k.sym_size(2) >= 1 &&
                        k.sym_size(3) == q.sym_size(3),
                    k_name, ": expected the shape of ", q_name, ", ", q.sym_sizes(),
                    ", but for the number of heads, got ", k.sym_sizes());
}

void check_qk_norm_rotary(const at::Tensor& q, const at::Tensor& k, const at::Tensor& cos,
                          const at::Tensor& sin, const std::optional<at::Tensor>& q_weight,
                          const std::optional<at::Tensor>& k_weight, double eps) {
  check_pair(q, "q", k, "k");
  check_tables(cos, sin, q, "q");
  check_weights(q_weight, k_weight, q, "q");
  check_eps(eps, "eps");
}

void check_qk_norm_rotary_backward(const at::Tensor& grad_q, const at::Tensor& grad_k,
                                   const std::optional<at::Tensor>& q,
                                   const std::optional<at::Tensor>& k, const at::Tensor& cos,
                                   const at::Tensor& sin, const std::optional<at::Tensor>& q_weight,
                                   const std::optional<at::Tensor>& k_weight, double eps,
                                   std::array<bool, 2> wanted) {
  check_pair(grad_q, "grad_q", grad_k, "grad_k");
  check_tables(cos, sin, grad_q, "grad_q");
  check_weights(q_weight, k_weight, grad_q, "grad_q");
  check_eps(eps, "eps");
  TORCH_CHECK_VALUE(q_weight.has_value() || !(wanted[0] || wanted[1]),
                    "wanted: expected no gradients of weights where there are none, got True");
  const auto check_given = [&](const std::optional<at::Tensor>& given, const char* name,
                               const at::Tensor& grad) {
    if (!q_weight.has_value()) return;
    TORCH_CHECK_TYPE(given.has_value(), name,
                     ": expected a tensor where there are norms, got None");
    check_same_dtype_device(*given, {name}, grad, "grad_q");
    TORCH_CHECK_VALUE(given->sym_sizes() == grad.sym_sizes(), name, ": expected shape ",
                      grad.sym_sizes(), " of its gradient, got ", given->sym_sizes());
  };
  check_given(q, "q", grad_q);
  check_given(k, "k", grad_k);
}

}  // namespace detail
}  // namespace muddformer
