// Generation of text with a cache of keys and values: token ids in, token ids out (tokenizer.h
// turns them into text).
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>

#include "../macros.h"
#include "../models/muddformer.h"

namespace muddformer {

/// How generate() chooses tokens; names and meaning are those of muddformer.generate in Python.
struct GenerateOptions {
  /// Number of tokens to add, at least 0; prompt and new tokens must fit into block_size.
  int64_t max_new_tokens = 0;
  /// 0: the likeliest token; otherwise drawn from softmax(logits / temperature).
  double temperature = 0;
  /// Draw among the k likeliest tokens only.
  std::optional<int64_t> top_k = std::nullopt;
  /// Draw among the likeliest tokens that together reach this probability only, in (0, 1].
  std::optional<double> top_p = std::nullopt;
  /// Makes the draws repeatable, and equal to Python's. Left out: torch's global generator.
  std::optional<int64_t> seed = std::nullopt;
  /// A sequence that reaches this token repeats it; all at it end the generation.
  std::optional<int64_t> eos_token_id = std::nullopt;
};

/// Continues token sequences. Gradients are not recorded.
///
/// @param model a causal one; where its parameters are, input_ids must be too.
/// @param input_ids prompts of one length, int64 or int32 [B, T].
/// @param on_tokens called with the new tokens [B, 1] of every step as soon as they are known;
///   returns false to end the generation with them.
/// @return prompt and new tokens [B, T + n], of the dtype of input_ids; n is max_new_tokens, or
///   less after eos_token_id or where on_tokens ends it.
/// @throws c10::TypeError, c10::ValueError, c10::IndexError naming the argument, what was expected
///   and what came, before the first token.
MUDDFORMER_API at::Tensor generate(MUDDFormer model, const at::Tensor& input_ids,
                                   const GenerateOptions& options,
                                   const std::function<bool(const at::Tensor&)>& on_tokens = {});

/// Draws token ids [B, 1] from logits [B, vocab_size], as generate() does.
///
/// @throws c10::ValueError, c10::TypeError naming the argument, what was expected and what came.
MUDDFORMER_API at::Tensor sample(const at::Tensor& logits, double temperature,
                                 std::optional<int64_t> top_k, std::optional<double> top_p,
                                 std::optional<at::Generator> generator);

}  // namespace muddformer
