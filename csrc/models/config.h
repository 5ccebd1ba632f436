// The configuration of a model: architecture, connections and nothing about training.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../macros.h"
#include "../nn/options.h"

namespace muddformer {

/// What a model computes (arXiv 2502.12170); the fields, their names and their defaults are those
/// of muddformer.MUDDFormerConfig in Python, and both read and write the same JSON.
///
/// Fill the fields by name, `MUDDFormerConfig{.n_layer = 4, .n_head = 4, .dim = 256}`, and every
/// user of it takes checked(): a copy whose values have been checked and whose optional fields
/// (but `window`, `cap`, `flush_interval` and `residual_dtype`) have been filled in.
struct MUDDFormerConfig {
  /// The family, a line of kFamilies in families.h: what the fields take that are left out.
  std::string model_type = "muddformer";
  /// Norms over the model width: "rms", an RMSNorm, or "layer", a LayerNorm with bias. Left out:
  /// the family's.
  std::optional<std::string> norm = std::nullopt;
  /// "swiglu", w2(silu(w1 x) * w3 x), or "gelu", w2(gelu(w1 x)). Left out: the family's.
  std::optional<std::string> feed_forward = std::nullopt;
  /// A position attends to itself and earlier ones; false: to all. Only causal models generate.
  bool causal = true;
  /// Number of tokens.
  int64_t vocab_size = 50432;
  /// Longest sequence.
  int64_t block_size = 2048;
  /// Number of blocks L.
  int64_t n_layer = 32;
  /// Number of query heads; the head width is dim / n_head.
  int64_t n_head = 32;
  /// Number of key and value heads, a divisor of n_head. Left out: n_head.
  std::optional<int64_t> n_kv_heads = std::nullopt;
  /// Model width D.
  int64_t dim = 2560;
  /// FFN hidden width before re-allocation. Left out: 8/3 D up to a multiple of 256 for SwiGLU, 4 D
  /// for GELU.
  std::optional<int64_t> intermediate_size = std::nullopt;
  /// FFN width grows with depth from half of intermediate_size to 1.5 times (Eq. 9).
  bool ffn_reallocation = true;
  /// Added to the variance in every norm. Left out: the family's.
  std::optional<double> norm_eps = std::nullopt;
  /// Base of the rotary frequencies.
  double rope_base = 10000.0;
  /// Rotated part of each head. Left out: the family's.
  std::optional<double> rotary_pct = std::nullopt;
  /// RMSNorm of every query and key head before the rotation.
  bool use_qk_norm = true;
  /// Attention and FFN read the same residual stream. Left out: the family's.
  std::optional<bool> use_parallel_residual = std::nullopt;
  /// Biases in attention and FFN. Left out: the family's.
  std::optional<bool> use_linear_bias = std::nullopt;
  /// The head shares the weight of the embedding.
  bool tie_word_embeddings = false;
  /// Standard deviation of fresh weight matrices and embeddings.
  double initializer_range = 0.02;
  /// q, k and v have a norm each (blocks that receive distinct streams only).
  bool separate_norms = true;

  /// false for the plain Transformer; of the fields below gelu_approximate and residual_dtype alone
  /// have an effect then.
  bool dense = true;
  /// Connection weights depend on the token; false for the static prior alone.
  bool dynamic = true;
  /// Every way has its own aggregate; false: one aggregate feeds all four streams.
  bool multiway = true;
  /// The ways that are aggregated, a part of "qkvr"; a way left out takes the newest hidden state.
  std::string ways = "qkvr";
  /// k of "k x p": every k-th hidden state is a source (with the first and the newest).
  int64_t source_stride = 1;
  /// p of "k x p": an aggregation after every p-th block and after the last.
  int64_t block_stride = 1;
  /// Only the newest `window` hidden states and the first are sources. Left out: all.
  std::optional<int64_t> window = std::nullopt;
  /// PreDANorm: hidden states are normed once, when they join the history (Eq. 10).
  bool pre_norm = false;
  /// PostDANorm: aggregates are added to the newest hidden state, after a norm of the residual way
  /// ("residual", as the training code has it) or of every way ("all", as the paper reads); or
  /// "none".
  std::string post_norm = "none";
  /// The last generator has a hidden layer four times as wide.
  bool expand_last = true;
  /// Hidden widths of the generators go up to the next multiple of 64.
  bool round64 = true;
  /// Soft bound of the connection weights, cap * tanh(A / cap). Left out: no bound.
  std::optional<double> cap = std::nullopt;
  /// "none" (erf form) or "tanh", in the generators and in the GELU FFN.
  std::string gelu_approximate = "none";
  /// How a backward adds to the gradients of older hidden states: once in so many aggregations (1:
  /// in each). Left out: on CUDA in groups that move the fewest bytes. Gradients differ by rounding
  /// alone.
  std::optional<int64_t> flush_interval = std::nullopt;
  /// dtype of the hidden states (history and residual stream) under autocast, "autocast" or
  /// "float32", see ConnectionOptions; outside autocast it has no effect. Left out: with
  /// connections autocast's, without as the embedding gives them.
  std::optional<std::string> residual_dtype = std::nullopt;

  bool operator==(const MUDDFormerConfig&) const = default;

  /// A copy whose every field has been checked, and whose optional fields have a value, but window,
  /// cap, flush_interval and residual_dtype.
  ///
  /// @throws c10::ValueError naming the field, what was expected and what came.
  MUDDFORMER_API MUDDFormerConfig checked() const;

  /// The fields from `dense` on as a stack of blocks takes them, a plain one with a single stream.
  MUDDFORMER_API ConnectionOptions connections() const;

  /// Width of one head. The derived values are those of a checked() configuration.
  ///
  /// @throws c10::ValueError if the configuration is not checked and its fields give no such value.
  ///   The two below do so too.
  MUDDFORMER_API int64_t head_dim() const;
  /// Number of rotated entries of each head.
  MUDDFORMER_API int64_t rotary_dim() const;
  /// Hidden width of the FFN of every block (Eq. 9: linear from 0.5 to 1.5 of intermediate_size).
  MUDDFORMER_API std::vector<int64_t> ffn_widths() const;

  /// The same Transformer without connections: equal blocks and widths, dense = false.
  MUDDFORMER_API MUDDFormerConfig plain_twin() const;

  /// The configuration of a published checkpoint: MUDDFormer-2.8B, MUDDPythia-1.4B or
  /// MUDDPythia-2.8B.
  ///
  /// @throws c10::ValueError for an unknown name, listing the known ones.
  MUDDFORMER_API static MUDDFormerConfig preset(std::string_view name);

  /// The checked configuration in a JSON object of field names and values, as to_json() and Python
  /// write it; fields left out take their defaults.
  ///
  /// @throws c10::ValueError, c10::TypeError for text that is no JSON object or has a key twice, an
  ///   unknown field or a wrong value.
  MUDDFORMER_API static MUDDFormerConfig from_json(std::string_view text);

  /// The checked configuration in a JSON object with the keys of the public release.
  ///
  /// Keys left out take the release's defaults; those that only say how the release runs are
  /// dropped. The family is "model_type" (or "model"), or else muddpythia if one of rotary_pct,
  /// use_parallel_residual and use_linear_bias is there.
  ///
  /// @throws c10::ValueError, c10::TypeError for an unknown key, or a value that is wrong or not
  ///   supported here.
  MUDDFORMER_API static MUDDFormerConfig from_official_json(std::string_view text);

  /// Whether a JSON object uses the keys of the public release instead of these fields.
  ///
  /// @throws c10::ValueError for text that is no JSON object.
  MUDDFORMER_API static bool is_official_json(std::string_view text);

  /// All fields of checked() as a JSON object, indented by two.
  MUDDFORMER_API std::string to_json() const;
};

}  // namespace muddformer
