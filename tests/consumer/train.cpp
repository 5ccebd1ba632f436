// Trains a small model for a few steps, with what is installed alone.
#include <muddformer/models.h>
#include <muddformer/muddformer.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <iostream>

int main() {
  torch::manual_seed(0);
  muddformer::MUDDFormer model(muddformer::MUDDFormerConfig{.vocab_size = 32,
                                                            .block_size = 16,
                                                            .n_layer = 3,
                                                            .n_head = 2,
                                                            .dim = 32,
                                                            .intermediate_size = 64,
                                                            .ffn_reallocation = false});
  torch::optim::AdamW optimizer(model->parameters(), torch::optim::AdamWOptions(5e-3));
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    // Counting, from anywhere.
    const at::Tensor rows = (torch::randint(32, {8, 1}, at::kLong) + torch::arange(17)) % 32;
    const at::Tensor loss = model->forward(rows.slice(1, 0, 16), rows.slice(1, 1));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  std::cout << "muddformer " << MUDDFORMER_VERSION << ": loss " << first << " -> " << last << '\n';
  return last < 0.8 * first ? 0 : 1;
}
