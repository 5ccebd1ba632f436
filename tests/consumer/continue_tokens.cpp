// continue_tokens CHECKPOINT COPY: loads a model that Python saved, saves it again, and writes the
// tokens that it draws into COPY/tokens.safetensors.
#include <muddformer/models.h>
#include <torch/types.h>

#include <filesystem>
#include <iostream>

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    const std::filesystem::path copy = argv[2];
    const muddformer::MUDDFormer model = muddformer::from_pretrained(argv[1]);
    muddformer::save_pretrained(model, copy);
    const at::Tensor prompt = torch::arange(3).repeat({2, 1});
    const auto draw = [&](muddformer::GenerateOptions options) {
      options.max_new_tokens = 12;
      return muddformer::generate(model, prompt, options);
    };
    muddformer::save_safetensors(
        {{"greedy", draw({})},
         {"sampled", draw({.temperature = 1.5, .seed = 7})},
         {"top", draw({.temperature = 2, .top_k = 9, .top_p = 0.9, .seed = 8})}},
        copy / "tokens.safetensors");
  } catch (const c10::Error& error) {
    std::cerr << error.what_without_backtrace() << '\n';
    return 1;
  }
}
