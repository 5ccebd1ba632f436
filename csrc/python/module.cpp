// muddformer._C: what the extension was built with. It links nothing of torch, so that it can be
// imported and asked before libmuddformer is loaded into a torch that may be another one.
#include <pybind11/pybind11.h>

#include "version.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "What muddformer was built with.";
  m.attr("version") = MUDDFORMER_VERSION;
  m.attr("torch_version") = MUDDFORMER_TORCH_VERSION;
  m.attr("cuda_version") = MUDDFORMER_CUDA_VERSION;
  m.attr("cuda_architectures") = MUDDFORMER_CUDA_ARCHITECTURES;
}
