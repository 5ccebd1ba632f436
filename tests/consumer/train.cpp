// README's program: train [FOLDER] trains a small model to count, saves it, loads it, generates.
#include <muddformer/models.h>
#include <muddformer/muddformer.h>
#include <torch/torch.h>

#include <iostream>

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "checkpoint";
  torch::manual_seed(0);
  const torch::Device device(torch::cuda::is_available() ? torch::kCUDA : torch::kCPU);
  const muddformer::MUDDFormerConfig config{
      .vocab_size = 32, .block_size = 16, .n_layer = 4, .n_head = 2, .dim = 64};
  muddformer::MUDDFormer model(config, device);
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(5e-3));
  for (int step = 0; step <= 60; ++step) {
    const auto rows = ((torch::randint(32, {8, 1}) + torch::arange(17)) % 32).to(torch::kLong);
    // Ids [B, T] and what follows each of them -> loss; ids alone -> logits [B, T, vocab_size].
    const auto ids = rows.slice(1, 0, 16).to(device), targets = rows.slice(1, 1).to(device);
    const auto loss = model->forward(ids, targets);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    if (step % 20 == 0) std::cout << "step " << step << ", loss " << loss.item<float>() << '\n';
  }
  muddformer::save_pretrained(model, folder);  // the files that Python reads and writes
  const auto loaded = muddformer::from_pretrained(folder, device);
  const auto prompt = torch::arange(4, device).unsqueeze(0);
  const auto tokens =
      muddformer::generate(loaded, prompt, {.max_new_tokens = 8, .temperature = 0.1, .seed = 0});
  std::cout << "muddformer " << MUDDFORMER_VERSION << '\n' << tokens << '\n';
  return tokens.equal(torch::arange(12, device).unsqueeze(0)) ? 0 : 1;  // it counts on
}
