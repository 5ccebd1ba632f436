// Gives the blocks of an existing LibTorch model MUDD connections: torch's own encoder layers,
// unchanged.
#include <fmt/format.h>
#include <muddformer/models.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/transformerlayer.h>
#include <torch/optim/adamw.h>
#include <torch/types.h>
#include <torch/utils.h>

#include <string>
#include <vector>

int main() {
  torch::manual_seed(0);
  const int64_t dim = 32;
  torch::nn::Sequential blocks;
  for (int i = 0; i < 6; ++i) {
    blocks->push_back(torch::nn::TransformerEncoderLayer(
        torch::nn::TransformerEncoderLayerOptions(dim, 4).dim_feedforward(64).dropout(0)));
  }
  // In place of: y = blocks->forward(x).
  muddformer::MUDDStack stack(blocks, dim);

  const at::Tensor x = torch::randn({16, 2, dim});  // [T, B, D]
  const bool same = torch::allclose(stack->forward(x), blocks->forward(x), 1e-5, 1e-5);
  fmt::print("fresh, the stack computes what the blocks compute: {}\n", same);

  torch::nn::Linear head(dim, dim);
  std::vector<at::Tensor> parameters = stack->parameters();
  for (const at::Tensor& parameter : head->parameters()) parameters.push_back(parameter);
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(5e-3));
  double first = 0, last = 0;
  for (int step = 1; step <= 60; ++step) {
    const at::Tensor input = torch::randn({16, 8, dim});
    const at::Tensor target = input - input.mean(0, /*keepdim=*/true);  // something to learn
    const at::Tensor loss = torch::mse_loss(head->forward(stack->forward(input)), target);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 1) first = last;
    if (step % 20 == 0) fmt::print("step {}: loss {:.3f}\n", step, last);
  }
  std::string newest;
  for (size_t i = 0; i < stack->connections.dense_bs->size(); ++i) {
    newest += fmt::format(" {:.3f}", (*stack->connections.dense_bs)[i][0][-1].item<double>());
  }
  fmt::print("static weight of the newest hidden state, 1 at the start:{}\n", newest);
  return same && last < first ? 0 : 1;
}
