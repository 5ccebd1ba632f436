// run_exported PACKAGE INPUTS OUTPUTS: runs a model that Python exported, without Python. PACKAGE
// is of torch._inductor.aoti_compile_and_package; INPUTS and OUTPUTS are safetensors files. The
// operators of this library are registered by linking it.
#include <muddformer/io/safetensors.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  try {
    const c10::InferenceMode inference;
    torch::inductor::AOTIModelPackageLoader model(argv[1]);
    const auto inputs = muddformer::load_safetensors(argv[2]);
    const std::vector<at::Tensor> outputs = model.run({inputs.at("input_ids")});
    muddformer::save_safetensors({{"logits", outputs.at(0)}}, argv[3]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
