// The connection weights on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer {

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("connection_weights", connection_weights_composition);
  m.impl("connection_weights_forward", connection_weights_forward_composition);
  m.impl("connection_weights_backward", connection_weights_backward_composition);
}

}  // namespace muddformer
