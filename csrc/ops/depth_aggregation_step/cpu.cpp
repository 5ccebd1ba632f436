// The decoding form of a layer on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer {

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("depth_aggregation_step", depth_aggregation_step_composition);
}

}  // namespace muddformer
