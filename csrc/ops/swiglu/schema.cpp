#include <torch/library.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "internal.h"

namespace muddformer {

TORCH_LIBRARY_FRAGMENT(muddformer, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("swiglu(Tensor gate, Tensor? up=None) -> Tensor", tags);
  m.def("swiglu_backward(Tensor grad, Tensor gate, Tensor? up) -> (Tensor, Tensor)", tags);
}

at::Tensor swiglu(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  detail::check_defined(gate, {"gate"});
  static const detail::Operator<decltype(swiglu)> op("swiglu");
  return op(gate, up);
}

namespace detail {

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                                   const std::optional<at::Tensor>& up) {
  static const Operator<decltype(swiglu_backward)> op("swiglu_backward");
  return op(grad, gate, up);
}

void check_swiglu(const at::Tensor& gate, const std::optional<at::Tensor>& up) {
  check_floating(gate, {"gate"});
  TORCH_CHECK_VALUE(gate.dim() >= 1, "gate: expected shape [..., F], got a scalar");
  if (up.has_value()) {
    check_like(*up, {"up"}, gate, "gate");
  } else {
    TORCH_CHECK_VALUE(gate.sym_size(-1) % 2 == 0,
                      "gate: expected shape [..., 2 F] where up is None, got ", gate.sym_sizes());
  }
}

void check_swiglu_backward(const at::Tensor& grad, const at::Tensor& gate,
                           const std::optional<at::Tensor>& up) {
  check_swiglu(gate, up);
  check_same_dtype_device(grad, {"grad"}, gate, "gate");
  const c10::SymDimVector sizes = swiglu_sizes(gate, !up.has_value());
  TORCH_CHECK_VALUE(grad.sym_sizes() == c10::SymIntArrayRef(sizes), "grad: expected shape ",
                    c10::SymIntArrayRef(sizes), " of the result, got ", grad.sym_sizes());
}

}  // namespace detail
}  // namespace muddformer
