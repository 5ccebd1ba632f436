// Under autocast gate and up take the autocast dtype, which products leave them in anyway.
#include "../common/autocast.h"

#include "swiglu.h"

namespace muddformer::detail {
namespace {

at::Tensor cast_and_call(const AutocastCasts& casts, const at::Tensor& gate,
                         const std::optional<at::Tensor>& up) {
  return swiglu(casts.narrow(gate), casts.narrow(up));
}

const AutocastLibrary library = AutocastLibrary().impl<cast_and_call>("swiglu");

}  // namespace
}  // namespace muddformer::detail
