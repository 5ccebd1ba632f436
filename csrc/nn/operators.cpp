#include "operators.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace muddformer {

bool runs_operators(const at::Tensor& x) {
  static const bool built = c10::Dispatcher::singleton()
                                .findSchemaOrThrow("muddformer::linear_forward", "")
                                .hasKernelForDispatchKey(c10::DispatchKey::CUDA);
  return built && x.is_cuda();
}

}  // namespace muddformer
