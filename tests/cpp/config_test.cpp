#include <gtest/gtest.h>
#include <muddformer/models/config.h>
#include <torch/types.h>

#include <limits>
#include <string>
#include <utility>

namespace muddformer {
namespace {

// A small configuration with `fields`, JSON without the braces, in place of its own.
MUDDFormerConfig read(const std::string& fields) {
  std::string text = fields;
  for (const auto& [name, value] :
       {std::pair("\"n_layer\"", "2"), std::pair("\"dim\"", "32"), std::pair("\"n_head\"", "4"),
        std::pair("\"vocab_size\"", "61"), std::pair("\"intermediate_size\"", "256")}) {
    if (fields.find(name) != std::string::npos) continue;
    text.append(", ").append(name).append(": ").append(value);
  }
  return MUDDFormerConfig::from_json("{" + text + "}");
}

// What `call` throws, without the trace of calls.
template <class Error = c10::Error, class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(Config, RoundTrip) {
  const MUDDFormerConfig config =
      read(R"("cap": 10, "ways": "rv", "window": 3, "post_norm": "all", "norm_eps": 1e-3,
              "model_type": "muddpythia", "rotary_pct": null)");
  EXPECT_EQ(config.cap, 10.0);
  EXPECT_EQ(config.ways, "vr");
  EXPECT_EQ(config.window, 3);
  EXPECT_EQ(config.norm_eps, 1e-3);
  EXPECT_EQ(config.rotary_pct, 0.25);
  EXPECT_EQ(MUDDFormerConfig::from_json(config.to_json()), config);
  EXPECT_EQ(config.checked(), config);
  MUDDFormerConfig plain = config;
  plain.dense = false;
  EXPECT_EQ(config.plain_twin(), plain);
  EXPECT_NE(config, plain);
}

TEST(Config, JsonIsPythons) {
  const std::string text = MUDDFormerConfig().to_json();
  EXPECT_EQ(text.find("{\n  \"model_type\": \"muddformer\",\n  \"norm\": \"rms\",\n  "
                      "\"feed_forward\": \"swiglu\",\n  \"causal\": true,\n"
                      "  \"vocab_size\": 50432,\n"),
            0u);
  EXPECT_TRUE(text.ends_with("\"flush_interval\": null,\n  \"residual_dtype\": null\n}"));
  EXPECT_NE(text.find("\"norm_eps\": 1e-06,\n  \"rope_base\": 10000.0,"), std::string::npos);
  EXPECT_NE(text.find("\"window\": null,\n"), std::string::npos);
}

TEST(Config, FamilyDefaults) {
  const MUDDFormerConfig former = MUDDFormerConfig().checked();
  const MUDDFormerConfig pythia = MUDDFormerConfig{.model_type = "muddpythia"}.checked();
  EXPECT_EQ(former.norm_eps, 1e-6);
  EXPECT_EQ(pythia.norm_eps, 1e-5);
  EXPECT_EQ(former.rotary_pct, 1.0);
  EXPECT_EQ(pythia.rotary_pct, 0.25);
  EXPECT_FALSE(*former.use_linear_bias || *former.use_parallel_residual);
  EXPECT_TRUE(*pythia.use_linear_bias && *pythia.use_parallel_residual);
  EXPECT_EQ(former.intermediate_size, 6912);
  EXPECT_EQ(pythia.intermediate_size, 10240);
  EXPECT_EQ(former.n_kv_heads, 32);
  EXPECT_EQ(former.norm, "rms");
  EXPECT_EQ(pythia.norm, "layer");
  EXPECT_EQ(former.feed_forward, "swiglu");
  EXPECT_EQ(pythia.feed_forward, "gelu");
}

TEST(Config, PartsBesideTheFamily) {
  const MUDDFormerConfig c = read(R"("norm": "layer", "feed_forward": "gelu", "causal": false,
                                     "residual_dtype": "float32")");
  EXPECT_EQ(c.norm, "layer");
  EXPECT_FALSE(c.causal);
  EXPECT_EQ(c.norm_eps, 1e-6);
  EXPECT_EQ(c.connections().residual_dtype, "float32");
  EXPECT_EQ((MUDDFormerConfig{.feed_forward = "gelu"}.checked().intermediate_size), 4 * 2560);
  EXPECT_EQ(MUDDFormerConfig::from_json(c.to_json()), c);
}

TEST(Config, Connections) {
  const ConnectionOptions options =
      MUDDFormerConfig{.ways = "rv", .source_stride = 2, .pre_norm = true, .cap = 5}.connections();
  EXPECT_EQ(options,
            (ConnectionOptions{
                .multiway = true, .ways = "vr", .source_stride = 2, .pre_norm = true, .cap = 5}));
  EXPECT_FALSE((MUDDFormerConfig{.dense = false, .ways = "rv"}.connections().multiway));
}

TEST(Config, Presets) {
  EXPECT_EQ(MUDDFormerConfig::preset("MUDDFormer-2.8B"), MUDDFormerConfig().checked());
  const MUDDFormerConfig pythia = MUDDFormerConfig::preset("MUDDPythia-1.4B");
  EXPECT_EQ(pythia.n_layer, 24);
  EXPECT_EQ(pythia.head_dim(), 128);
  EXPECT_EQ(pythia.rotary_dim(), 32);
  EXPECT_EQ(MUDDFormerConfig::preset("MUDDPythia-2.8B").intermediate_size, 10240);
  EXPECT_NE(error_of<c10::ValueError>([] {
              MUDDFormerConfig::preset("GPT-5");
            }).find("name must be one of 'MUDDFormer-2.8B', "),
            std::string::npos);
}

TEST(Config, WidthsOfTheFeedForwardNetworks) {
  using Widths = std::vector<int64_t>;
  MUDDFormerConfig c{.n_layer = 4, .intermediate_size = 176};
  EXPECT_EQ(c.ffn_widths(), (Widths{128, 128, 256, 256}));
  c.intermediate_size = 256;  // 1.5 and 2.5 times 128 go to the even multiple
  EXPECT_EQ(c.ffn_widths(), (Widths{128, 256, 256, 384}));
  c.ffn_reallocation = false;
  EXPECT_EQ(c.ffn_widths(), (Widths{256, 256, 256, 256}));
  EXPECT_EQ((MUDDFormerConfig{.n_layer = 1, .intermediate_size = 48}.ffn_widths()), Widths{48});
}

TEST(Config, OfficialKeys) {
  const MUDDFormerConfig config = MUDDFormerConfig::from_official_json(R"({
      "model_type": "muddpythia", "n_layer": 24, "dim": 2048, "n_head": 16, "n_local_heads": -1,
      "head_dim": 64, "intermediate_size": 8192, "vocab_size": 50432, "block_size": 2048,
      "rope_base": 10000, "norm_eps": 1e-5, "use_qk_norm": true, "dense": true,
      "dynamic_dense": true, "dense_type": "qkvr", "sepln": true, "expand_last": true,
      "round64": true, "stack_hidden": false, "use_layer_cache": true, "is_training": false,
      "rotary_pct": 0.25, "use_parallel_residual": true, "use_linear_bias": true,
      "window_size": null, "architectures": ["MUDDPythia"], "torch_dtype": "float16"})");
  EXPECT_EQ(config, MUDDFormerConfig::preset("MUDDPythia-1.4B"));
}

TEST(Config, OfficialDefaultsAndFamilies) {
  const auto official = MUDDFormerConfig::from_official_json;
  MUDDFormerConfig expected;
  expected.use_qk_norm = expected.expand_last = expected.round64 = false;
  EXPECT_EQ(official("{}"), expected.checked());
  EXPECT_EQ(official(R"({"rotary_pct": 0.25})").model_type, "muddpythia");
  EXPECT_EQ(official(R"({"rotary_pct": 0.25, "model_type": "muddformer"})").norm_eps, 1e-6);
  EXPECT_EQ(official(R"({"model": "muddpythia"})").norm_eps, 1e-5);
  EXPECT_EQ(official(R"({"n_local_heads": 8})").n_kv_heads, 8);
  EXPECT_FALSE(official(R"({"dense_type": "l"})").multiway);
  EXPECT_TRUE(official(R"({"dense_type": "qkvm"})").multiway);
  EXPECT_FALSE(official(R"({"sepln": false})").separate_norms);
  EXPECT_FALSE(official(R"({"dynamic_dense": false})").dynamic);
  const MUDDFormerConfig more = official(
      R"({"dense_type": "qkvr", "pre_norm": true, "post_norm": "all", "window": 3, "cap": 10.0,
          "ffn_reallocation": false, "residual_dtype": "float32", "norm": "layer"})");
  EXPECT_TRUE(more.pre_norm && !more.ffn_reallocation);
  EXPECT_EQ(more.post_norm, "all");
  EXPECT_EQ(more.window, 3);
  EXPECT_EQ(more.cap, 10.0);
  EXPECT_EQ(more.norm, "layer");
  EXPECT_FALSE(MUDDFormerConfig::is_official_json(MUDDFormerConfig().to_json()));
  EXPECT_TRUE(MUDDFormerConfig::is_official_json(R"({"dense_type": "qkvr"})"));
}

TEST(ConfigErrors, NameTheFieldWhatWasExpectedAndWhatCame) {
  const std::pair<const char*, const char*> wrong_values[] = {
      {R"("n_layer": 0)", "n_layer must be from 1 to 1024, got 0"},
      {R"("dim": 99999999999999999999)", "dim must be an integer, got 1e+20"},
      {R"("dim": 18446744073709551615)", "dim must be from 1 to 1048576, got 9223372036854775807"},
      {R"("window": -1)", "window must be from 1 to 65536, got -1"},
      {R"("norm_eps": 0.0)", "norm_eps must be more than 0 and at most 1, got 0"},
      {R"("norm_eps": 2)", "norm_eps must be more than 0 and at most 1, got 2"},
      {R"("cap": -1)", "cap must be more than 0 and finite, got -1"},
      {R"("ways": "qq")", "ways must be a part of 'qkvr', not empty and no letter twice, got 'qq'"},
      {R"("ways": "")", "ways must be a part of 'qkvr', not empty and no letter twice, got ''"},
      {R"("post_norm": "both")", "post_norm must be one of 'none', 'residual', 'all', got 'both'"},
      {R"("gelu_approximate": "erf")", "gelu_approximate must be one of 'none', 'tanh', got 'erf'"},
      {R"("model_type": "gpt2")", "model_type must be one of 'muddformer', "},
      {R"("norm": "batch")", "norm must be one of 'rms', 'layer', got 'batch'"},
      {R"("feed_forward": "relu")", "feed_forward must be one of 'swiglu', 'gelu', got 'relu'"},
      {R"("residual_dtype": "half")", "residual_dtype must be one of 'autocast', 'float32', got"},
      {R"("n_head": 5)", "dim must be a multiple of n_head, got dim=32 and n_head=5"},
      {R"("n_kv_heads": 3)", "n_kv_heads must divide n_head, got n_kv_heads=3 and n_head=4"},
      {R"("rotary_pct": 0.1)", "got 0.1 of dim // n_head = 8, which are 0"},
      {R"("rotary_pct": 0.4)", "which are 3"},
      {R"("intermediate_size": 100)", "intermediate_size is too small for ffn_reallocation"},
      {R"("multiway": false, "ways": "qr")", "ways must be 'qkvr' with multiway=false"},
      {R"("widow": 3)", "unknown key 'widow': not a field of MUDDFormerConfig"},
      {R"("a": 0, "b": 0, "c": 0, "d": 0, "e": 0, "f": 0)", "unknown key 'a', 'b', 'c', 'd', 'e':"},
  };
  for (const auto& [text, expected] : wrong_values) {
    const std::string error = error_of([&] { read(text); });
    EXPECT_NE(error.find(expected), std::string::npos) << text << " gives: " << error;
  }
  const std::pair<const char*, const char*> wrong_types[] = {
      {R"("n_layer": 2.0)", "n_layer must be an integer, got 2.0"},
      {R"("n_layer": true)", "n_layer must be an integer, got true"},
      {R"("n_layer": null)", "n_layer must be an integer, got null"},
      {R"("window": "2")", "window must be an integer, got '2'"},
      {R"("dense": 1)", "dense must be true or false, got 1"},
      {R"("causal": null)", "causal must be true or false, got null"},
      {R"("norm": 1)", "norm must be a string, got 1"},
      {R"("norm_eps": "x")", "norm_eps must be a number, got 'x'"},
      {R"("ways": ["q"])", R"(ways must be a string, got ["q"])"},
      {R"("cap": {"a": 1})", R"(cap must be a number, got {"a":1})"},
  };
  for (const auto& [text, expected] : wrong_types) {
    const std::string error = error_of<c10::TypeError>([&] { read(text); });
    EXPECT_NE(error.find(expected), std::string::npos) << text << " gives: " << error;
  }
}

TEST(ConfigErrors, OfAStruct) {
  MUDDFormerConfig c;
  c.initializer_range = std::numeric_limits<double>::quiet_NaN();
  EXPECT_NE(error_of<c10::ValueError>([&] { c.checked(); }).find("initializer_range must be more"),
            std::string::npos);
  EXPECT_THROW(c.to_json(), c10::ValueError);
}

TEST(ConfigErrors, OfDerivedValues) {
  EXPECT_THROW(MUDDFormerConfig{.n_head = 0}.head_dim(), c10::ValueError);
  EXPECT_THROW((MUDDFormerConfig{.n_layer = -1, .intermediate_size = 256}.ffn_widths()),
               c10::ValueError);
  MUDDFormerConfig c;
  EXPECT_THROW(c.rotary_dim(), c10::ValueError);
  c.rotary_pct = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(c.rotary_dim(), c10::ValueError);
}

TEST(ConfigErrors, OfTheOfficialKeys) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"n_layers": 4})", "unknown key 'n_layers': not a field of the public release"},
      {R"({"dense_type": "qk"})", "dense_type must be 'qkvr', 'qkvm' or 'l', got 'qk'"},
      {R"({"window_size": 256})", "window_size must be null"},
      {R"({"n_local_heads": -2})", "n_kv_heads must be from 1"},
      {R"({"sepln": 1})", "separate_norms must be true or false, got 1"},
  };
  for (const auto& [text, expected] : cases) {
    const std::string error = error_of([&] { MUDDFormerConfig::from_official_json(text); });
    EXPECT_NE(error.find(expected), std::string::npos) << text << " gives: " << error;
  }
}

TEST(ConfigErrors, TextThatIsNoObject) {
  for (const char* text :
       {"", "{", "{\"dim\": }", "nonsense", "{\"dim\": 1e999}", "{\"\xff\": 1}"}) {
    EXPECT_NE(error_of<c10::ValueError>([&] {
                MUDDFormerConfig::from_json(text);
              }).find("the configuration: not valid JSON"),
              std::string::npos)
        << text;
  }
  EXPECT_NE(error_of<c10::ValueError>([] {
              MUDDFormerConfig::from_json("[1]");
            }).find("the configuration: must hold a JSON object, got array"),
            std::string::npos);
  EXPECT_NE(error_of<c10::ValueError>([] {
              MUDDFormerConfig::from_json(R"({"dim": 32, "dim": 64})");
            }).find("'dim' twice"),
            std::string::npos);
  const std::string deep = "{\"dim\": " + std::string(100000, '[');
  EXPECT_NE(error_of<c10::ValueError>([&] { MUDDFormerConfig::from_json(deep); }).find("nested"),
            std::string::npos);
}

}  // namespace
}  // namespace muddformer
