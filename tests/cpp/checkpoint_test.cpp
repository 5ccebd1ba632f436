#include <gtest/gtest.h>
#include <muddformer/io/safetensors.h>
#include <muddformer/models/checkpoint.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <cstring>
#include <map>

#include "files.h"
#include "variants.h"

namespace muddformer {
namespace {

using at::Tensor;
using samples::scrambled;
using testing_files::damaged;
using testing_files::error_of;
using testing_files::Folder;
using testing_files::read_bytes;
using testing_files::write_bytes;
using Tensors = std::map<std::string, Tensor>;

const Tensor ids = torch::arange(6).unsqueeze(0);

MUDDFormerConfig tiny() {
  MUDDFormerConfig config = samples::small();
  config.n_layer = 2;
  config.dim = 16;
  config.n_head = 2;
  config.n_kv_heads = 2;
  return config;
}

void expect(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << message << "\n  has no " << part;
}

TEST(Checkpoint, RoundTrip) {
  for (const samples::Variant& variant : samples::variants()) {
    const Folder folder;
    MUDDFormer model = scrambled(variant.config);
    save_pretrained(model, folder / "a/b");
    MUDDFormer loaded = from_pretrained(folder / "a/b");
    EXPECT_EQ(loaded->config, model->config);
    EXPECT_TRUE(torch::equal(loaded->forward(ids), model->forward(ids)));
    loaded->forward(ids, ids).backward();
    for (const Tensor& parameter : loaded->parameters()) EXPECT_TRUE(parameter.requires_grad());
    // What is loaded is saved as the same bytes.
    save_pretrained(loaded, folder / "c");
    for (const char* name : {"model.safetensors", "config.json"}) {
      EXPECT_EQ(read_bytes(folder / "c" / name), read_bytes(folder / "a/b" / name));
    }
  }
}

TEST(Checkpoint, DtypeAndNoTieToTheFile) {
  const Folder folder;
  save_pretrained(scrambled(tiny()), folder.path());
  MUDDFormer model = from_pretrained(folder.path(), at::kCPU, at::kBFloat16);
  for (const Tensor& parameter : model->parameters()) {
    EXPECT_EQ(parameter.scalar_type(), at::kBFloat16);
  }
  save_pretrained(model, folder.path());
  model = from_pretrained(folder.path());
  EXPECT_EQ(model->tok_embeddings->weight.scalar_type(), at::kBFloat16);
  const Tensor expected = model->forward(ids);
  write_bytes(folder / "model.safetensors", "");
  EXPECT_TRUE(torch::equal(model->forward(ids), expected));
  expect(error_of([&] { from_pretrained(folder.path(), at::kCPU, at::kChar); }), "dtype must be");

  // Stored dtypes may differ from tensor to tensor.
  Tensors state;
  for (const auto& parameter : model->named_parameters())
    state[parameter.key()] = parameter.value();
  state["norm.weight"] = state["norm.weight"].to(at::kDouble);
  save_safetensors(state, folder / "model.safetensors");
  const auto parameters = from_pretrained(folder.path())->named_parameters();
  EXPECT_EQ(parameters["norm.weight"].scalar_type(), at::kDouble);
  EXPECT_EQ(parameters["output.weight"].scalar_type(), at::kBFloat16);
}

TEST(Checkpoint, Shards) {
  const Folder folder;
  MUDDFormer model = scrambled(tiny());
  save_pretrained(model, folder.path());
  const Tensors state = load_safetensors(folder / "model.safetensors");
  std::filesystem::remove(folder / "model.safetensors");
  Tensors shards[2];
  std::string map;
  for (const auto& [name, tensor] : state) {
    const int shard = static_cast<int>(name.size() % 2);
    shards[shard][name] = tensor;
    map +=
        (map.empty() ? "\"" : ", \"") + name + "\": \"" + std::to_string(shard) + ".safetensors\"";
  }
  for (int shard : {0, 1}) {
    save_safetensors(shards[shard], folder / (std::to_string(shard) + ".safetensors"));
  }
  const std::filesystem::path index = folder / "model.safetensors.index.json";
  const auto load = [&](const std::string& text) {
    write_bytes(index, text);
    return error_of([&] { from_pretrained(folder.path()); });
  };
  EXPECT_EQ(load("{\"metadata\": {}, \"weight_map\": {" + map + "}}"), "no error");
  EXPECT_TRUE(torch::equal(from_pretrained(folder.path())->forward(ids), model->forward(ids)));
  expect(load("{\"weight_map\": {" + map + ", \"norm.bias\": \"0.safetensors\"}}"),
         "norm.bias is said to be in 0.safetensors, which does not have it");
  expect(load("{\"weight_map\": {" + map + ", \"x\": \"3.safetensors\"}}"),
         "3.safetensors: no such file");
  for (const char* bad : {"\"../0.safetensors\"", "\"a\\u0000.safetensors\"", "\"0.bin\"", "3",
                          "null", "\"/0.safetensors\""}) {
    expect(load("{\"weight_map\": {\"x\": " + std::string(bad) + "}}"),
           "weight_map must name .safetensors files beside it");
  }
  expect(load("{}"), "no weight_map");
  expect(load("{\"weight_map\": {}}"), "no weight_map");
  expect(load("[]"), "must hold a JSON object, got array");
  expect(load("{"), "index.json: not valid JSON");
  std::filesystem::remove(folder / "1.safetensors");
  expect(load("{\"weight_map\": {" + map + "}}"), "1.safetensors: no such file");
}

TEST(Checkpoint, TensorsThatDoNotFit) {
  const Folder folder;
  save_pretrained(scrambled(tiny()), folder.path());
  const Tensors state = load_safetensors(folder / "model.safetensors");
  const auto load = [&](const std::function<void(Tensors&)>& edit) {
    Tensors edited = state;
    edit(edited);
    save_safetensors(edited, folder / "model.safetensors");
    const std::string message = error_of([&] { from_pretrained(folder.path()); });
    expect(message, (folder / "model.safetensors").string());
    return message;
  };
  expect(load([](Tensors& s) { s.clear(); }), "0 tensors are too few for n_layer=2");
  expect(load([](Tensors& s) { s["extra"] = torch::ones({1}); }),
         "1 unknown tensor(s) for this configuration: extra");
  expect(load([](Tensors& s) { s.erase("norm.weight"); }), "1 missing tensor(s) for this");
  expect(load([](Tensors& s) { s.erase("norm.weight"); }), "norm.weight");
  expect(load([](Tensors& s) { s["norm.weight"] = torch::ones({17}); }),
         "norm.weight must have shape [16], got [17]");
  expect(load([](Tensors& s) { s["norm.weight"] = torch::ones({1, 16}); }),
         "norm.weight must have shape [16], got [1, 16]");
  expect(load([](Tensors& s) { s["norm.weight"] = torch::ones({16}, at::kLong); }),
         "norm.weight must be float64, float32, float16 or bfloat16, got Long");
  expect(load([](Tensors& s) {
           for (auto name : {"norm.weight", "output.weight", "dense_bs.0", "dense_bs.1",
                             "layers.0.ffn_norm.weight", "layers.1.ffn_norm.weight"}) {
             s.erase(name);
           }
         }),
         "6 missing tensor(s) for this configuration: ");
}

TEST(Checkpoint, TiedHeadMayBeStored) {
  const Folder folder;
  MUDDFormerConfig config = tiny();
  config.tie_word_embeddings = true;
  MUDDFormer model = scrambled(config);
  save_pretrained(model, folder.path());
  Tensors state = load_safetensors(folder / "model.safetensors");
  EXPECT_FALSE(state.contains("output.weight"));
  state["output.weight"] = state["tok_embeddings.weight"];
  save_safetensors(state, folder / "model.safetensors");
  EXPECT_TRUE(torch::equal(from_pretrained(folder.path())->forward(ids), model->forward(ids)));
  state["output.weight"] = state["output.weight"] + 1;
  save_safetensors(state, folder / "model.safetensors");
  expect(error_of([&] { from_pretrained(folder.path()); }),
         "output.weight differs from tok_embeddings.weight");
}

TEST(Checkpoint, BadConfigurations) {
  const Folder folder;
  save_pretrained(scrambled(tiny()), folder.path());
  const std::string whole = read_bytes(folder / "config.json");
  const auto load = [&](const std::string& text) {
    write_bytes(folder / "config.json", text);
    const std::string message = error_of([&] { from_pretrained(folder.path()); });
    if (message != "no error") expect(message, folder.path().string());
    return message;
  };
  const auto edited = [&](const std::string& from, const std::string& to) {
    std::string text = whole;
    const size_t place = text.find(from);
    EXPECT_NE(place, std::string::npos) << from;
    return text.replace(place, from.size(), to);
  };
  EXPECT_EQ(load(whole), "no error");
  expect(load(""), "config.json: not valid JSON");
  expect(load("[]"), "config.json: must hold a JSON object, got array");
  expect(load(std::string(1 << 20, ' ') + whole), "bytes are too many");
  expect(load(std::string(100000, '[')), "nested more than 16 levels");
  expect(load(edited("\"dim\": 16", "\"dim\": 16, \"dim\": 16")), "'dim' twice");
  expect(load(edited("\"dim\": 16", "\"dim\": 16, \"width\": 16")), "unknown key 'width'");
  expect(load(edited("\"dim\": 16", "\"dim\": \"16\"")), "dim must be an integer, got '16'");
  expect(load(edited("\"dim\": 16", "\"dim\": 1e400")), "not valid JSON");
  expect(load(edited("\"n_layer\": 2", "\"n_layer\": 1024")), "are too few for n_layer=1024");
  expect(load(edited("\"n_layer\": 2", "\"n_layer\": 1000000")), "n_layer must be from 1");
  expect(load(edited("\"n_layer\": 2", "\"n_layer\": 3")), "missing tensor(s)");
  expect(load(edited("\"vocab_size\": 61", "\"vocab_size\": 2147483647")),
         "weight must have shape [2147483647, 16], got [61, 16]");
  expect(load(edited("\"dense\": true", "\"dense\": false")), "layers.1.attention_norm.weight");
  for (const char* name : {"config.json", "model.safetensors"}) {
    write_bytes(folder / "config.json", whole);
    std::filesystem::remove(folder / name);
    expect(error_of([&] { from_pretrained(folder.path()); }), std::string(name) + ": no such file");
  }
}

TEST(Checkpoint, BadSave) {
  const Folder folder;
  expect(error_of([&] { save_pretrained(MUDDFormer(nullptr), folder / "x"); }), "model must be");
  expect(error_of([&] { save_pretrained(MUDDFormer(tiny(), at::kMeta, false), folder / "x"); }),
         "on the meta device");
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  write_bytes(folder / "taken", "");
  expect(error_of([&] { save_pretrained(MUDDFormer(tiny()), folder / "taken"); }), "taken");
  EXPECT_EQ(read_bytes(folder / "taken"), "");
}

// Cut or changed bytes give an error that names the file, or a model where only values changed.
TEST(Checkpoint, AnyDamageIsHarmless) {
  const Folder folder;
  MUDDFormerConfig config = tiny();
  config.n_layer = 1;
  config.dim = 8;
  config.intermediate_size = 8;
  save_pretrained(MUDDFormer(config), folder.path());
  uint64_t length = 0;
  const std::string weights = read_bytes(folder / "model.safetensors");
  std::memcpy(&length, weights.data(), sizeof(length));
  const std::string header = weights.substr(0, 8 + length);
  size_t refused = 0, read = 0;
  const auto load = [&](const char* name, const std::string& bytes) {
    write_bytes(folder / name, bytes);
    const std::string message =
        error_of([&] { from_pretrained(folder.path())->forward(ids.slice(1, 0, 1)); });
    ++(message == "no error" ? read : refused);
    if (message != "no error") expect(message, folder.path().string());
  };
  const std::string text = read_bytes(folder / "config.json");
  size_t number = 0;
  for (const std::string& bytes : damaged(text, text.size())) {
    if (number++ % 7 == 0) load("config.json", bytes);
  }
  write_bytes(folder / "config.json", text);
  for (const std::string& bytes : damaged(header, header.size())) {
    if (number++ % 17 == 0) load("model.safetensors", bytes + weights.substr(header.size()));
  }
  EXPECT_GT(refused, 2000u);
  EXPECT_GT(read, 50u);
}

}  // namespace
}  // namespace muddformer
