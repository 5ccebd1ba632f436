// Trains the connection of two hidden states for a few steps, with what is installed alone.
#include <muddformer/muddformer.h>
#include <torch/optim/sgd.h>
#include <torch/types.h>

#include <iostream>
#include <vector>

int main() {
  torch::manual_seed(0);
  const int64_t tokens = 16, width = 32, hidden = 8, ways = 4, sources = 2;
  const auto leaf = [](at::IntArrayRef shape) { return torch::randn(shape).requires_grad_(); };
  const at::Tensor older = leaf({tokens, width}), newest = leaf({tokens, width});
  const std::vector<at::Tensor> parameters = {leaf({hidden, width}), leaf({ways * sources, hidden}),
                                              leaf({ways, sources})};
  torch::optim::SGD optimizer(parameters, 0.01);
  double first = 0, last = 0;
  for (int step = 0; step < 20; ++step) {
    const auto [weights, x] =
        muddformer::connection_weights_chained(newest, parameters[0], parameters[1], parameters[2]);
    const auto [streams, hiddens] = muddformer::depth_aggregate_chained({older, x}, weights);
    const at::Tensor loss = torch::stack(streams).square().mean();
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
  }
  std::cout << "muddformer " << MUDDFORMER_VERSION << ": loss " << first << " -> " << last << '\n';
  return last < first ? 0 : 1;
}
