// Runs the cases that tests/models/test_cpp_parity.py writes: `parity THREADS CASE...` reads every
// file CASE.safetensors (param/*, input_ids, targets; the configuration in the metadata) and writes
// what this library computes of it into CASE.result.safetensors: logits, loss, grad/*, decoded
// (logits of a decode with a cache, if causal), fresh/* (initial values of seed 0) and the
// configuration.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <muddformer/io/safetensors.h>
#include <muddformer/models.h>
#include <torch/csrc/autograd/autograd.h>

#include <iostream>
#include <map>
#include <string>

namespace {

using at::Tensor;
using Tensors = std::map<std::string, Tensor>;

// Copies the case's parameters into a model; their names and shapes are those of the model.
void fill(muddformer::MUDDFormer& model, const muddformer::SafetensorsFile& file) {
  const at::NoGradGuard no_grad;
  auto parameters = model->named_parameters();
  size_t given = 0;
  for (const auto& [name, entry] : file.entries()) given += name.rfind("param/", 0) == 0;
  TORCH_CHECK(given == parameters.size(), "the case has ", given, " parameters, the model ",
              parameters.size());
  for (auto& item : parameters) {
    const Tensor value = file.tensor("param/" + item.key());
    TORCH_CHECK(value.sizes() == item.value().sizes(), item.key(), " has another shape");
    item.value().copy_(value);
  }
}

Tensor decode(muddformer::MUDDFormer& model, const Tensor& ids) {
  const at::NoGradGuard no_grad;
  const int64_t length = ids.size(1), prompt = length / 2;
  muddformer::KVCache cache(model->config, ids.size(0), length,
                            model->tok_embeddings->weight.options());
  std::vector<Tensor> parts = {model->forward(ids.narrow(1, 0, prompt), {}, &cache)};
  for (int64_t t = prompt; t < length; ++t) {
    parts.push_back(model->forward(ids.narrow(1, t, 1), {}, &cache));
  }
  return at::cat(parts, 1);
}

void run(const std::string& path) {
  const muddformer::SafetensorsFile file(path + ".safetensors");
  const auto config = muddformer::MUDDFormerConfig::from_json(file.metadata().at("config"));
  const at::ScalarType dtype = file.entries().at("param/tok_embeddings.weight").dtype;
  muddformer::MUDDFormer model(config, dtype, /*initialize=*/false);
  fill(model, file);
  const Tensor ids = file.tensor("input_ids"), targets = file.tensor("targets");

  Tensors found;
  found["logits"] = model->forward(ids).detach();
  const Tensor loss = model->forward(ids, targets);
  loss.backward();
  found["loss"] = loss.detach();
  for (const auto& item : model->named_parameters()) {
    found["grad/" + item.key()] = item.value().grad();
  }
  if (model->config.causal) found["decoded"] = decode(model, ids);
  at::manual_seed(0);
  model->reset_parameters();
  for (const auto& item : model->named_parameters()) {
    found["fresh/" + item.key()] = item.value().detach();
  }
  muddformer::save_safetensors(found, path + ".result.safetensors",
                               {{"config", model->config.to_json()}});
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: parity THREADS CASE...\n";
    return 2;
  }
  at::set_num_threads(std::stoi(argv[1]));
  for (int i = 2; i < argc; ++i) {
    try {
      run(argv[i]);
    } catch (const std::exception& error) {
      std::cerr << argv[i] << ": " << error.what() << '\n';
      return 1;
    }
  }
}
