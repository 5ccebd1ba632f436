#include "muddformer.h"

#include <ATen/ATen.h>

#include <string>
#include <tuple>
#include <utility>

#include "../nn/checks.h"
#include "../ops/linear_cross_entropy/linear_cross_entropy.h"

namespace muddformer {

namespace {

void check_ids(const char* name, const at::Tensor& ids, at::Device device) {
  TORCH_CHECK_TYPE(ids.defined(), name, " must be a tensor, got an undefined one");
  TORCH_CHECK_TYPE(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt, name,
                   " must be int64 or int32, got ", ids.scalar_type());
  TORCH_CHECK_VALUE(ids.dim() == 2, name, " must be [batch, tokens], got shape ", ids.sizes());
  TORCH_CHECK_VALUE(ids.device() == device, name, " must be on ", device, ", like the model, got ",
                    ids.device());
}

at::TensorOptions checked(at::TensorOptions options) {
  check_dtype("options", options);
  return options;
}

}  // namespace

MUDDFormerImpl::MUDDFormerImpl(const MUDDFormerConfig& given, at::TensorOptions options,
                               bool initialize)
    : Cloneable("muddformer::MUDDFormer"),
      config(given.checked()),
      connections(config.dim, config.n_layer, config.connections(), *config.norm_eps,
                  checked(options)),
      options_(options) {
  reset();
  if (initialize) reset_parameters();
}

void MUDDFormerImpl::reset() {
  const MUDDFormerConfig& c = config;
  const bool distinct = c.dense && c.multiway && c.separate_norms;
  layers = torch::nn::ModuleList();
  for (int64_t i = 0; i < c.n_layer; ++i) {
    // Blocks that no aggregation stands before receive one stream and have one norm, as the first
    // has.
    const bool separate = distinct && i > 0 && i % c.block_stride == 0;
    layers->push_back(Block(c, i, separate, options_, /*initialize=*/false));
  }
  register_module("layers", layers);
  connections.reset(*this);
  tok_embeddings = register_module(
      "tok_embeddings", Embedding(c.vocab_size, c.dim, c.initializer_range, options_, false));
  rotary = register_module("rotary", RotaryEmbedding(c));
  norm = register_module("norm", Norm(c.dim, *c.norm_eps, norm_kind(c), 1.0, options_, false));
  if (!c.tie_word_embeddings) {
    output = register_module(
        "output", Linear(c.dim, c.vocab_size, false, c.initializer_range, options_, false));
  }
}

void MUDDFormerImpl::reset_parameters() {
  for (size_t i = 0; i < layers->size(); ++i) layers->ptr<BlockImpl>(i)->reset_parameters();
  tok_embeddings->reset_parameters();
  norm->reset_parameters();
  if (output) output->reset_parameters();
  connections.reset_parameters();
}

at::Tensor MUDDFormerImpl::forward(const at::Tensor& input_ids, const at::Tensor& targets,
                                   KVCache* cache) {
  const at::Device device = tok_embeddings->weight.device();
  check_ids("input_ids", input_ids, device);
  const int64_t length = input_ids.size(1);
  if (targets.defined()) {
    check_ids("targets", targets, device);
    TORCH_CHECK_VALUE(targets.sizes() == input_ids.sizes(),
                      "targets must have the shape of input_ids ", input_ids.sizes(), ", got ",
                      targets.sizes());
  }
  const at::Tensor x0 = embed(input_ids);
  Rotary tables;
  at::Tensor positions, mask;
  if (cache == nullptr) {
    TORCH_CHECK_VALUE(length <= config.block_size,
                      "input_ids must have at most block_size=", config.block_size, " tokens, got ",
                      length);
    tables = rotary->forward(length, device);
  } else {
    TORCH_CHECK_VALUE(input_ids.size(0) == cache->batch_size(), "input_ids must be ",
                      cache->batch_size(), " sequences, as many as the cache has, got ",
                      input_ids.size(0));
    cache->check_fits(config, tok_embeddings->weight);
    std::tie(positions, mask) = cache->reserve(length);
    tables = rotary->forward_at(positions);
  }
  History history = connections.begin(x0);
  for (size_t i = 0; i < layers->size(); ++i) {
    history.append(layers->ptr<BlockImpl>(i)->forward(history, tables, mask, cache));
  }
  const at::Tensor x = norm->forward(history.result());
  at::Tensor y;
  if (targets.defined()) {
    y = linear_cross_entropy(x, output ? output->weight : tok_embeddings->weight, targets);
  } else {
    y = output ? output->forward(x) : at::linear(x, tok_embeddings->weight);
  }
  if (cache != nullptr) cache->commit();  // nothing failed
  return y;
}

at::Tensor MUDDFormerImpl::embed(const at::Tensor& input_ids) {
  try {
    return tok_embeddings->forward(input_ids);
  } catch (const c10::IndexError&) {
    TORCH_CHECK_INDEX(false, "input_ids must be from 0 to vocab_size - 1 = ", config.vocab_size - 1,
                      ", got ", input_ids.min().item<int64_t>(), " to ",
                      input_ids.max().item<int64_t>());
  }
}

MUDDFormer MUDDFormerImpl::plain_twin() const {
  const at::NoGradGuard no_grad;
  MUDDFormer twin(config.plain_twin(), tok_embeddings->weight.options(), /*initialize=*/false);
  const auto parameters = named_parameters();
  for (auto& item : twin->named_parameters()) {
    const std::string& name = item.key();
    const at::Tensor* source = parameters.find(name);
    if (source == nullptr) {  // layers.i.attention_norm.* of three equal attention_norms
      const size_t at = name.find("attention_norm.") + std::string("attention_norm").size();
      const auto of_way = [&](const char* way) {
        return &parameters[name.substr(0, at) + "s." + way + name.substr(at)];
      };
      source = of_way("0");
      TORCH_CHECK_VALUE(at::equal(*source, *of_way("1")) && at::equal(*source, *of_way("2")),
                        name.substr(0, at), "s differ, so this model has no plain twin");
    }
    item.value().copy_(*source);
  }
  twin->train(is_training());
  return twin;
}

}  // namespace muddformer
