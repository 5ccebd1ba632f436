#include "generation.h"

#include <ATen/Context.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/aminmax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <limits>
#include <mutex>
#include <utility>
#include <vector>

#include "../nn/checks.h"

namespace muddformer {

namespace {

void check_prompt(const MUDDFormerConfig& config, at::Device device, const at::Tensor& input_ids) {
  TORCH_CHECK_TYPE(input_ids.defined(), "input_ids must be a tensor, got an undefined one");
  TORCH_CHECK_TYPE(input_ids.scalar_type() == at::kLong || input_ids.scalar_type() == at::kInt,
                   "input_ids must be int64 or int32, got ", input_ids.scalar_type());
  TORCH_CHECK_VALUE(input_ids.dim() == 2 && input_ids.numel() > 0,
                    "input_ids must be [batch, tokens] and not empty, got shape ",
                    input_ids.sizes());
  TORCH_CHECK_VALUE(input_ids.device() == device, "input_ids must be on ", device,
                    ", like the model, got ", input_ids.device());
  const auto [low, high] = at::aminmax(input_ids);
  const auto least = low.item<int64_t>(), most = high.item<int64_t>();
  TORCH_CHECK_INDEX(least >= 0 && most < config.vocab_size,
                    "input_ids must be from 0 to vocab_size - 1 = ", config.vocab_size - 1,
                    ", got ", least, " to ", most);
}

void check_options(const MUDDFormerConfig& config, int64_t prompt, const GenerateOptions& options) {
  check_integer("max_new_tokens", options.max_new_tokens, kLargestInteger, 0);
  TORCH_CHECK_VALUE(prompt + options.max_new_tokens <= config.block_size,
                    "input_ids and max_new_tokens must fit into block_size=", config.block_size,
                    ", got ", prompt, " + ", options.max_new_tokens);
  if (options.temperature != 0) check_real("temperature", options.temperature);
  if (options.top_k) check_integer("top_k", *options.top_k);
  if (options.top_p) check_real("top_p", *options.top_p, 0, 1);
  if (options.seed) {
    check_integer("seed", *options.seed, std::numeric_limits<int64_t>::max(), 0);
  }
  if (options.eos_token_id) {
    check_integer("eos_token_id", *options.eos_token_id, config.vocab_size - 1, 0);
  }
}

// A generator of any device: its kinds need not be known, nor linked, here.
at::Generator seeded_generator(at::Device device, int64_t seed) {
  at::Generator global = at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(global.mutex());
  at::Generator generator = global.clone();
  generator.set_current_seed(static_cast<uint64_t>(seed));
  return generator;
}

}  // namespace

at::Tensor generate(MUDDFormer model, const at::Tensor& input_ids, const GenerateOptions& options,
                    const std::function<bool(const at::Tensor&)>& on_tokens) {
  TORCH_CHECK_TYPE(!model.is_empty(), "model must be a MUDDFormer, got none");
  const MUDDFormerConfig& config = model->config;
  const at::TensorOptions parameters = model->tok_embeddings->weight.options();
  check_prompt(config, parameters.device(), input_ids);
  check_options(config, input_ids.size(1), options);
  std::optional<at::Generator> generator;
  if (options.seed) generator = seeded_generator(input_ids.device(), *options.seed);

  const at::NoGradGuard no_grad;
  const int64_t batch = input_ids.size(0), length = input_ids.size(1) + options.max_new_tokens;
  KVCache cache(config, batch, length, parameters);
  at::Tensor ended = at::zeros({batch, 1}, input_ids.options().dtype(at::kBool));
  std::vector<at::Tensor> tokens = {input_ids};
  for (int64_t step = 0; step < options.max_new_tokens; ++step) {
    const at::Tensor logits = model->forward(tokens.back(), {}, &cache).select(1, -1);
    at::Tensor fresh = options.temperature == 0 ? logits.argmax(-1, /*keepdim=*/true)
                                                : sample(logits, options.temperature, options.top_k,
                                                         options.top_p, generator);
    fresh = fresh.to(input_ids.scalar_type());
    if (options.eos_token_id) {
      fresh = fresh.masked_fill(ended, *options.eos_token_id);
      ended = fresh == *options.eos_token_id;
    }
    tokens.push_back(fresh);
    if (on_tokens && !on_tokens(fresh)) break;
    if (options.eos_token_id && ended.all().item<bool>()) break;
  }
  return at::cat(tokens, 1);
}

at::Tensor sample(const at::Tensor& logits, double temperature, std::optional<int64_t> top_k,
                  std::optional<double> top_p, std::optional<at::Generator> generator) {
  TORCH_CHECK_TYPE(logits.defined(), "logits must be a tensor, got an undefined one");
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1,
                    "logits must be [B, vocab_size] with vocab_size >= 1, got shape ",
                    logits.sizes());
  check_real("temperature", temperature);
  if (top_k) check_integer("top_k", *top_k);
  if (top_p) check_real("top_p", *top_p, 0.0, 1.0);
  // The likeliest first: what top_k and top_p keep is then a prefix, never empty. float64 bears any
  // temperature.
  const auto [sorted, order] = at::sort(logits.to(at::kDouble), /*stable=*/true, /*dim=*/-1,
                                        /*descending=*/true);
  at::Tensor probabilities = ((sorted - sorted.narrow(-1, 0, 1)) / temperature).softmax(-1);
  if (top_k && *top_k < probabilities.size(-1)) probabilities.slice(-1, *top_k).zero_();
  if (top_p) {
    probabilities = probabilities / probabilities.sum(-1, /*keepdim=*/true);
    const at::Tensor before = probabilities.cumsum(-1) - probabilities;
    probabilities = probabilities.masked_fill(before >= *top_p, 0);
  }
  return order.gather(-1, at::multinomial(probabilities, 1, /*replacement=*/false, generator));
}

}  // namespace muddformer
