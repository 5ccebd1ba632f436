// The decoding form of a layer on the CPU.
#include <torch/library.h>

#include "composition.h"

namespace muddformer::detail {

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("depth_aggregation_step", flat<depth_aggregation_step_composition>);
}

}  // namespace muddformer::detail
