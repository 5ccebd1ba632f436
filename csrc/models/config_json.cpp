#include "config_json.h"

#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <string_view>

#include "../io/files.h"
#include "../nn/checks.h"
#include "config_fields.h"

namespace muddformer {

namespace {

using Json = nlohmann::json;

void read(const char* name, const Json& value, std::string& field) {
  TORCH_CHECK_TYPE(value.is_string(), name, " must be a string, got ", shown(value));
  field = value.get<std::string>();
}

void read(const char* name, const Json& value, bool& field) {
  TORCH_CHECK_TYPE(value.is_boolean(), name, " must be true or false, got ", shown(value));
  field = value.get<bool>();
}

void read(const char* name, const Json& value, int64_t& field) {
  TORCH_CHECK_TYPE(value.is_number_integer(), name, " must be an integer, got ", shown(value));
  // Whatever does not fit is above every limit.
  constexpr auto largest = std::numeric_limits<int64_t>::max();
  const bool fits = !value.is_number_unsigned() || value.get<uint64_t>() <= uint64_t{largest};
  field = fits ? value.get<int64_t>() : largest;
}

void read(const char* name, const Json& value, double& field) {
  TORCH_CHECK_TYPE(value.is_number(), name, " must be a number, got ", shown(value));
  field = value.get<double>();
}

template <class T>
void read(const char* name, const Json& value, std::optional<T>& field) {
  if (value.is_null()) {
    field.reset();
  } else {
    T read_value{};
    read(name, value, read_value);
    field = read_value;
  }
}

// A configuration's text; what errors call it.
Json parse(std::string_view text) {
  return parse_json(text, "the configuration");
}

void check_keys(const Json& values, const std::set<std::string>& known, const char* owner) {
  std::string unknown;
  int count = 0;
  for (const auto& [key, value] : values.items()) {
    if (known.count(key) != 0 || ++count > 5) continue;
    unknown.append(unknown.empty() ? "" : ", ").append(shown(key));
  }
  TORCH_CHECK_VALUE(count == 0, "unknown key ", unknown, ": not a field of ", owner);
}

// The fields that are there, and the defaults of `config` for the others.
MUDDFormerConfig read_fields(const Json& values, MUDDFormerConfig config) {
  const auto read_field = [&](const char* name, auto& field) {
    const auto found = values.find(name);
    if (found != values.end()) read(name, *found, field);
  };
  for_each_field(read_field, config);
  return config.checked();
}

bool has_value(const Json& values, const char* name) {
  const auto found = values.find(name);
  return found != values.end() && !found->is_null();
}

// Keys of the public release that have another name here.
const std::set<std::string> kRenamed = {"n_local_heads", "dynamic_dense", "dense_type", "sepln"};
// Those whose meaning is the same here, and fields that it has no key for.
const std::set<std::string> kSame = {"block_size",
                                     "vocab_size",
                                     "n_layer",
                                     "n_head",
                                     "dim",
                                     "intermediate_size",
                                     "rope_base",
                                     "norm_eps",
                                     "use_qk_norm",
                                     "rotary_pct",
                                     "use_parallel_residual",
                                     "use_linear_bias",
                                     "tie_word_embeddings",
                                     "dense",
                                     "expand_last",
                                     "round64"};
// Fields that the release has no key for: read under our names.
const std::set<std::string> kOurs = {
    "norm",      "feed_forward",  "causal",           "ffn_reallocation", "initializer_range",
    "ways",      "source_stride", "block_stride",     "window",           "pre_norm",
    "post_norm", "cap",           "gelu_approximate", "flush_interval",   "residual_dtype"};
// Those that say how the release runs, not what it computes, or that are read one by one below. Its
// head_dim is always overwritten by dim / n_head.
const std::set<std::string> kOther = {"model_type",
                                      "model",
                                      "window_size",
                                      "window_type",
                                      "head_dim",
                                      "is_training",
                                      "use_layer_cache",
                                      "stack_hidden",
                                      "use_gradient_checkpointing",
                                      "pad_token_id",
                                      "bos_token_id",
                                      "eos_token_id",
                                      "architectures",
                                      "auto_map",
                                      "dtype",
                                      "torch_dtype",
                                      "transformers_version",
                                      "_name_or_path",
                                      "use_cache",
                                      "skip_logits"};

}  // namespace

MUDDFormerConfig config_from(const Json& values) {
  std::set<std::string> known;
  const MUDDFormerConfig defaults;
  for_each_field([&](const char* name, const auto&) { known.insert(name); }, defaults);
  check_keys(values, known, "MUDDFormerConfig");
  return read_fields(values, defaults);
}

MUDDFormerConfig config_from_official(const Json& values) {
  std::set<std::string> known = kRenamed;
  known.insert(kSame.begin(), kSame.end());
  known.insert(kOurs.begin(), kOurs.end());
  known.insert(kOther.begin(), kOther.end());
  check_keys(values, known, "the public release");
  for (const char* name : {"window_size", "window_type"}) {
    TORCH_CHECK_VALUE(!has_value(values, name), name,
                      " must be null (no sliding-window attention here), got ",
                      shown(values.value(name, Json())));
  }
  // The same JSON with this library's names and the release's defaults.
  Json ours = {{"use_qk_norm", false}, {"expand_last", false}, {"round64", false}};
  for (const auto* names : {&kSame, &kOurs}) {
    for (const std::string& name : *names) {
      if (values.contains(name)) ours[name] = values[name];
    }
  }
  const bool pythia = has_value(values, "rotary_pct") ||
                      has_value(values, "use_parallel_residual") ||
                      has_value(values, "use_linear_bias");
  ours["model_type"] = pythia ? "muddpythia" : "muddformer";
  for (const char* name : {"model", "model_type"}) {
    if (has_value(values, name)) ours["model_type"] = values[name];
  }
  const Json kv_heads = values.value("n_local_heads", Json());
  if (!kv_heads.is_number_integer() || kv_heads != -1) ours["n_kv_heads"] = kv_heads;
  if (values.contains("dynamic_dense")) ours["dynamic"] = values["dynamic_dense"];
  if (values.contains("sepln")) ours["separate_norms"] = values["sepln"];
  const Json dense_type = values.value("dense_type", Json("qkvr"));
  TORCH_CHECK_VALUE(dense_type == "qkvr" || dense_type == "qkvm" || dense_type == "l",
                    "dense_type must be 'qkvr', 'qkvm' or 'l', got ", shown(dense_type));
  ours["multiway"] = dense_type != "l";
  return read_fields(ours, {});
}

bool is_official(const Json& values) {
  for (const std::string& name : kRenamed) {
    if (values.contains(name)) return true;
  }
  return false;
}

MUDDFormerConfig MUDDFormerConfig::from_json(std::string_view text) {
  return config_from(parse(text));
}

MUDDFormerConfig MUDDFormerConfig::from_official_json(std::string_view text) {
  return config_from_official(parse(text));
}

bool MUDDFormerConfig::is_official_json(std::string_view text) {
  return is_official(parse(text));
}

std::string MUDDFormerConfig::to_json() const {
  auto values = nlohmann::ordered_json::object();
  const MUDDFormerConfig config = checked();
  const auto write_field = [&](const char* name, const auto& field) {
    if constexpr (requires { field.has_value(); }) {
      values[name] = field ? nlohmann::ordered_json(*field) : nullptr;
    } else {
      values[name] = field;
    }
  };
  for_each_field(write_field, config);
  return values.dump(2);
}

}  // namespace muddformer
