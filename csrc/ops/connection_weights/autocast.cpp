// Under autocast x, W1 and W2 take the autocast dtype; the small prior and scale are read in
// float32.
#include "../common/autocast.h"

#include "connection_weights.h"

namespace muddformer::detail {
namespace {

template <auto op>
auto cast_and_call(const AutocastCasts& casts, const at::Tensor& x, const at::Tensor& w1,
                   const at::Tensor& w2, const at::Tensor& prior, const GeneratorOptions& options) {
  return op(casts.narrow(x), casts.narrow(w1), casts.narrow(w2), casts.wide(prior),
            casts.wide(options));
}

const AutocastLibrary library =
    AutocastLibrary()
        .impl<cast_and_call<connection_weights>>("connection_weights")
        .impl<cast_and_call<connection_weights_chained>>("connection_weights_chained");

}  // namespace
}  // namespace muddformer::detail
