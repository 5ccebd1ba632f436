#include "checkpoint.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/equal.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../io/files.h"
#include "../io/safetensors.h"
#include "config_json.h"

namespace muddformer {

namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigName = "config.json";
constexpr const char* kWeightsName = "model.safetensors";
constexpr const char* kPickleName = "pytorch_model.bin";
constexpr const char* kIndexName = "model.safetensors.index.json";
constexpr const char* kEmbedding = "tok_embeddings.weight";
constexpr const char* kHead = "output.weight";

constexpr uint64_t kLargestConfig = uint64_t{1} << 20;
constexpr uint64_t kLargestIndex = uint64_t{1} << 26;

bool is_parameter_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble || dtype == at::kFloat || dtype == at::kHalf ||
         dtype == at::kBFloat16;
}

// The open safetensors files of a directory and the one of every tensor.
class Weights {
 public:
  explicit Weights(const fs::path& directory) {
    path = directory / kIndexName;
    if (!is_file(path) || is_file(directory / kWeightsName)) {
      path = directory / kWeightsName;
      TORCH_CHECK_VALUE(is_file(path) || !is_file(directory / kPickleName), path.string(),
                        ": no such file, and ", kPickleName,
                        " is read by Python alone: muddformer convert makes the one of the other");
      const SafetensorsFile& file = open(directory, kWeightsName);
      for (const auto& [name, entry] : file.entries()) tensors[name] = &file;
      return;
    }
    const nlohmann::json index = read_json(path, kLargestIndex);
    const auto shards = index.find("weight_map");
    TORCH_CHECK_VALUE(shards != index.end() && shards->is_object() && !shards->empty(),
                      path.string(), ": no weight_map of tensor names to file names");
    for (const auto& [name, shard] : shards->items()) {
      const std::string file_name = shard.is_string() ? shard.get<std::string>() : "";
      TORCH_CHECK_VALUE(
          file_name.ends_with(".safetensors") &&
              file_name.find_first_of(std::string_view("/\\:\0", 4)) == std::string::npos,
          path.string(), ": weight_map must name .safetensors files beside it, got ", shown(shard));
      const SafetensorsFile& file = open(directory, file_name);
      TORCH_CHECK_VALUE(file.entries().contains(name), path.string(), ": ", shown_name(name),
                        " is said to be in ", shown_name(file_name), ", which does not have it");
      tensors[name] = &file;
    }
  }

  const SafetensorsEntry& entry(const std::string& name) const {
    return tensors.at(name)->entries().at(name);
  }
  at::Tensor tensor(const std::string& name) const { return tensors.at(name)->tensor(name); }

  fs::path path;  // of the file that lists the tensors
  std::map<std::string, const SafetensorsFile*> tensors;

 private:
  const SafetensorsFile& open(const fs::path& directory, const std::string& name) {
    const auto found = files_.find(name);
    return found != files_.end() ? found->second
                                 : files_.emplace(name, directory / name).first->second;
  }

  std::map<std::string, SafetensorsFile> files_;
};

void check_none(const std::vector<std::string>& names, const char* problem, const fs::path& path) {
  if (names.empty()) return;
  std::string listed = shown_name(names[0]);
  for (size_t i = 1; i < names.size() && i < 5; ++i) listed += ", " + shown_name(names[i]);
  TORCH_CHECK_VALUE(false, path.string(), ": ", names.size(), " ", problem,
                    " tensor(s) for this configuration: ", listed, names.size() > 5 ? ", ..." : "");
}

// Names, shapes and dtypes, from the headers alone. Nothing of the model's size has been allocated
// before.
void check_tensors(const Weights& weights, const MUDDFormerConfig& config,
                   const fs::path& config_path) {
  std::map<std::string, std::vector<int64_t>> expected;
  try {
    const MUDDFormer model(config, at::TensorOptions(at::kMeta), /*initialize=*/false);
    for (const auto& parameter : model->named_parameters()) {
      expected[parameter.key()] = parameter.value().sizes().vec();
    }
  } catch (const c10::Error& error) {  // sizes whose product overflows
    TORCH_CHECK_VALUE(false, config_path.string(),
                      ": no model has these sizes: ", error.what_without_backtrace());
  }
  if (config.tie_word_embeddings && weights.tensors.contains(kHead)) {
    expected[kHead] = expected[kEmbedding];
  }
  std::vector<std::string> missing, unknown;
  for (const auto& [name, shape] : expected) {
    if (!weights.tensors.contains(name)) missing.push_back(name);
  }
  for (const auto& [name, file] : weights.tensors) {
    if (!expected.contains(name)) unknown.push_back(name);
  }
  check_none(missing, "missing", weights.path);
  check_none(unknown, "unknown", weights.path);
  for (const auto& [name, shape] : expected) {
    const SafetensorsEntry& entry = weights.entry(name);
    TORCH_CHECK_VALUE(entry.shape == shape, weights.path.string(), ": ", name, " must have shape ",
                      at::IntArrayRef(shape), ", got ", at::IntArrayRef(entry.shape));
    TORCH_CHECK_VALUE(is_parameter_dtype(entry.dtype), weights.path.string(), ": ", name,
                      " must be float64, float32, float16 or bfloat16, got ", entry.dtype);
  }
  if (config.tie_word_embeddings && weights.tensors.contains(kHead)) {
    TORCH_CHECK_VALUE(weights.entry(kHead).dtype == weights.entry(kEmbedding).dtype &&
                          at::equal(weights.tensor(kHead), weights.tensor(kEmbedding)),
                      weights.path.string(), ": ", kHead, " differs from ", kEmbedding,
                      ", but tie_word_embeddings is set");
  }
}

}  // namespace

void save_pretrained(const MUDDFormer& model, const fs::path& directory) {
  TORCH_CHECK_TYPE(!model.is_empty(), "model must be a MUDDFormer, got none");
  std::map<std::string, at::Tensor> state;
  for (const auto& parameter : model->named_parameters()) {
    TORCH_CHECK_VALUE(!parameter.value().is_meta(),
                      "model must have values to save, but its parameters are on the meta device");
    state[parameter.key()] = parameter.value();
  }
  make_directories(directory);
  const std::string config = model->config.to_json() + "\n";
  save_safetensors(state, directory / kWeightsName);
  write_file(directory / kConfigName, std::vector<std::string_view>{config});
}

MUDDFormer from_pretrained(const fs::path& directory, c10::Device device,
                           std::optional<c10::ScalarType> dtype) {
  TORCH_CHECK_TYPE(!dtype || is_parameter_dtype(*dtype),
                   "dtype must be float64, float32, float16 or bfloat16, got ",
                   dtype.value_or(at::kFloat));
  const MUDDFormerConfig config = load_config(directory);
  const Weights weights(directory);
  // Before anything is built: a hostile n_layer must not take long.
  TORCH_CHECK_VALUE(weights.tensors.size() > static_cast<size_t>(config.n_layer),
                    weights.path.string(), ": ", weights.tensors.size(),
                    " tensors are too few for n_layer=", config.n_layer);
  check_tensors(weights, config, directory / kConfigName);

  const at::NoGradGuard no_grad;
  const at::ScalarType built = dtype.value_or(weights.entry(kEmbedding).dtype);
  MUDDFormer model(config, at::TensorOptions(built).device(device), /*initialize=*/false);
  for (auto& parameter : model->named_parameters()) {
    const at::Tensor stored = weights.tensor(parameter.key());  // a view of the mapped file
    parameter.value().set_data(stored.to(device, dtype.value_or(stored.scalar_type()),
                                         /*non_blocking=*/false,
                                         /*copy=*/true));
  }
  return model;
}

MUDDFormerConfig load_config(const fs::path& directory) {
  const fs::path path = directory / kConfigName;
  const nlohmann::json values = read_json(path, kLargestConfig);
  try {
    return is_official(values) ? config_from_official(values) : config_from(values);
  } catch (const c10::Error& error) {
    C10_THROW_ERROR(ValueError,
                    c10::str(path.string(), ": ", shown_name(error.what_without_backtrace(), 500)));
  }
}

}  // namespace muddformer
