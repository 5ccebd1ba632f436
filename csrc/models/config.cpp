#include "config.h"

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "../nn/checks.h"
#include "config_fields.h"
#include "families.h"

namespace muddformer {

namespace {

constexpr int64_t kMostLayers = 1024;

// Exact for any double: int(x) of Python.
int64_t truncated(double x) {
  return static_cast<int64_t>(x);
}

void check_sizes(const MUDDFormerConfig& c) {
  // Far above any model, low enough that a broken file cannot ask for an endless build.
  check_integer("vocab_size", c.vocab_size);
  check_integer("block_size", c.block_size, 1 << 22);
  check_integer("n_layer", c.n_layer, kMostLayers);
  check_integer("n_head", c.n_head, 1 << 16);
  check_integer("dim", c.dim, 1 << 20);
  if (c.n_kv_heads) check_integer("n_kv_heads", *c.n_kv_heads, 1 << 16);
  if (c.intermediate_size) check_integer("intermediate_size", *c.intermediate_size, 1 << 24);
}

const Family& family_of(const std::string& model_type) {
  std::vector<std::string_view> names;
  for (const Family& family : kFamilies) {
    if (family.name == model_type) return family;
    names.push_back(family.name);
  }
  check_choice("model_type", model_type, names);
  return kFamilies[0];  // not reached: the check has thrown
}

void fill_in(MUDDFormerConfig& c) {
  const Family& family = family_of(c.model_type);
  if (!c.norm) c.norm = family.norm;
  if (!c.feed_forward) c.feed_forward = family.feed_forward;
  if (!c.norm_eps) c.norm_eps = family.norm_eps;
  if (!c.rotary_pct) c.rotary_pct = family.rotary_pct;
  if (!c.use_parallel_residual) c.use_parallel_residual = family.use_parallel_residual;
  if (!c.use_linear_bias) c.use_linear_bias = family.use_linear_bias;
  if (!c.n_kv_heads) c.n_kv_heads = c.n_head;
  if (!c.intermediate_size) {
    const int64_t two_thirds = truncated(8 * static_cast<double>(c.dim) / 3);
    c.intermediate_size = *c.feed_forward == "swiglu" ? (two_thirds + 255) / 256 * 256 : 4 * c.dim;
  }
}

void check_reals(const MUDDFormerConfig& c) {
  check_real("norm_eps", *c.norm_eps, 0.0, 1.0);
  check_real("rope_base", c.rope_base);
  check_real("rotary_pct", *c.rotary_pct, 0.0, 1.0);
  check_real("initializer_range", c.initializer_range);
}

void check_combinations(const MUDDFormerConfig& c) {
  TORCH_CHECK_VALUE(c.dim % c.n_head == 0, "dim must be a multiple of n_head, got dim=", c.dim,
                    " and n_head=", c.n_head);
  TORCH_CHECK_VALUE(c.n_head % *c.n_kv_heads == 0,
                    "n_kv_heads must divide n_head, got n_kv_heads=", *c.n_kv_heads,
                    " and n_head=", c.n_head);
  const int64_t rotary = c.rotary_dim();
  TORCH_CHECK_VALUE(rotary >= 2 && rotary % 2 == 0,
                    "rotary_pct must select an even number of at least 2 entries of a head: got ",
                    *c.rotary_pct, " of dim // n_head = ", c.head_dim(), ", which are ", rotary);
  TORCH_CHECK_VALUE(c.block_size * rotary <= int64_t{1} << 30,
                    "block_size is too large for the tables of rotary positions: got ",
                    c.block_size, " positions of ", rotary, " entries, more than 2**30 numbers");
  if (c.ffn_reallocation) {
    const std::vector<int64_t> widths = c.ffn_widths();
    TORCH_CHECK_VALUE(
        *std::min_element(widths.begin(), widths.end()) >= 1,
        "intermediate_size is too small for ffn_reallocation, which rounds widths to "
        "multiples of 128: got ",
        *c.intermediate_size,
        ", which leaves a block with a width of 0 (more than 128, or ffn_reallocation=false)");
  }
}

ConnectionOptions options_of(const MUDDFormerConfig& c) {
  ConnectionOptions options;
  for_each_option([](const char*, auto& to, const auto& from) { to = from; }, options, c);
  return options;
}

}  // namespace

MUDDFormerConfig MUDDFormerConfig::checked() const {
  MUDDFormerConfig c = *this;
  check_sizes(c);
  fill_in(c);
  check_choice("norm", *c.norm, {"rms", "layer"});
  check_choice("feed_forward", *c.feed_forward, {"swiglu", "gelu"});
  check_reals(c);
  c.ways = options_of(c).checked().ways;
  check_combinations(c);
  return c;
}

ConnectionOptions MUDDFormerConfig::connections() const {
  ConnectionOptions options = options_of(*this);
  options.multiway = dense && multiway;
  return options.checked();
}

int64_t MUDDFormerConfig::head_dim() const {
  check_integer("n_head", n_head);
  return dim / n_head;
}

int64_t MUDDFormerConfig::rotary_dim() const {
  TORCH_CHECK_VALUE(rotary_pct.has_value(), "rotary_pct has no value: use checked()");
  check_real("rotary_pct", rotary_pct.value(), 0.0, 1.0);
  return truncated(static_cast<double>(head_dim()) * rotary_pct.value());
}

std::vector<int64_t> MUDDFormerConfig::ffn_widths() const {
  TORCH_CHECK_VALUE(intermediate_size.has_value(), "intermediate_size has no value: use checked()");
  check_integer("n_layer", n_layer, kMostLayers);
  std::vector<int64_t> widths(static_cast<size_t>(n_layer), intermediate_size.value());
  if (!ffn_reallocation || n_layer == 1) return widths;
  const auto last = static_cast<double>(n_layer - 1);
  for (int64_t i = 0; i < n_layer; ++i) {
    // In the release's order of operations, rounding half to even: at a tie the last bit decides a
    // width.
    const double width =
        static_cast<double>(*intermediate_size) * (static_cast<double>(i) / last + 0.5) / 128;
    widths[static_cast<size_t>(i)] = static_cast<int64_t>(std::nearbyint(width)) * 128;
  }
  return widths;
}

MUDDFormerConfig MUDDFormerConfig::plain_twin() const {
  MUDDFormerConfig twin = *this;
  twin.dense = false;
  return twin.checked();
}

MUDDFormerConfig MUDDFormerConfig::preset(std::string_view name) {
  MUDDFormerConfig c;
  if (name == "MUDDFormer-2.8B") {
    c = {.model_type = "muddformer",
         .n_layer = 32,
         .n_head = 32,
         .dim = 2560,
         .intermediate_size = 6912};
  } else if (name == "MUDDPythia-1.4B") {
    c = {.model_type = "muddpythia",
         .n_layer = 24,
         .n_head = 16,
         .dim = 2048,
         .intermediate_size = 8192};
  } else if (name == "MUDDPythia-2.8B") {
    c = {.model_type = "muddpythia",
         .n_layer = 32,
         .n_head = 32,
         .dim = 2560,
         .intermediate_size = 10240};
  } else {
    check_choice("name", name, {"MUDDFormer-2.8B", "MUDDPythia-1.4B", "MUDDPythia-2.8B"});
  }
  return c.checked();
}

}  // namespace muddformer
