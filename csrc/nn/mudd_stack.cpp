#include "mudd_stack.h"

#include <c10/util/Exception.h>

#include <cstdint>
#include <utility>

namespace muddformer {

namespace {

torch::nn::Sequential checked(torch::nn::Sequential blocks) {
  TORCH_CHECK_TYPE(!blocks.is_empty(), "blocks must be a Sequential, got an empty holder");
  return blocks;
}

}  // namespace

MUDDStackImpl::MUDDStackImpl(torch::nn::Sequential blocks, int64_t dim,
                             const ConnectionOptions& options, double eps,
                             at::TensorOptions tensor_options, bool initialize,
                             MakeAggregation make_aggregation)
    : Cloneable("muddformer::MUDDStack"),
      layers(checked(std::move(blocks))),
      connections(dim, static_cast<int64_t>(layers->size()), options, eps, tensor_options,
                  std::move(make_aggregation)) {
  reset();
  if (initialize) reset_parameters();
}

void MUDDStackImpl::reset() {
  // A container of its own: clone() replaces what is in it.
  torch::nn::Sequential blocks;
  const auto named = layers->named_children();
  auto name = named.begin();
  for (const torch::nn::AnyModule& block : *layers) blocks->push_back((name++)->key(), block);
  layers = register_module("layers", blocks);
  connections.reset(*this);
}

}  // namespace muddformer
