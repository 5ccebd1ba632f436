// The connection weights on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("connection_weights", flat<connection_weights_composition>);
  m.impl("connection_weights_forward", flat<connection_weights_forward_composition>);
  m.impl("connection_weights_backward", flat<connection_weights_backward_composition>);
}

}  // namespace muddformer::detail
