#include <gtest/gtest.h>
#include <muddformer/nn.h>
#include <torch/torch.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "autocast.h"
#include "files.h"
#include "reference.h"

namespace muddformer {
namespace {

using at::Tensor;
using testing_autocast::Autocast;
using testing_files::expect_error;

void scramble(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  for (Tensor& parameter : module.parameters()) parameter.add_(torch::randn_like(parameter), 0.3);
}

// Connections of two blocks that belong to a module without blocks.
struct Owner : torch::nn::Module {
  explicit Owner(const ConnectionOptions& options = {}) : connections(8, 2, options) {
    connections.reset(*this);
    connections.reset_parameters();
    scramble(*this);
  }
  Connections connections;
};

TEST(History, IsUsedInOrder) {
  const Owner owner;
  const Tensor x = torch::randn({3, 8});
  History history = owner.connections.begin(x);
  expect_error([&] { history.append(x); }, "append() came before streams() of block 0");
  expect_error([&] { history.result(); }, "result() came before the output of block 0 of 2");
  EXPECT_TRUE(history.streams().at(0).is_same(x));
  expect_error([&] { history.streams(); },
               "streams were made already for block 0; append its output first");
  expect_error([&] { history.result(); }, "result() came before the output of block 0 of 2");
  history.append(x + 1);
  expect_error([&] { history.append(x); }, "append() came before streams() of block 1");
  history.streams();
  history.append(x + 2);
  expect_error([&] { history.streams(); }, "after the output of the last of the 2 blocks");
  expect_error([&] { history.append(x); }, "after the output of the last of the 2 blocks");
  EXPECT_EQ(history.result().sizes(), x.sizes());
  for (const auto& call : std::vector<std::function<void()>>{
           [&] { history.result(); }, [&] { history.streams(); }, [&] { history.append(x); }}) {
    expect_error(call, "came after result(), with which a history ends");
  }
}

TEST(History, ChecksWhatItIsGiven) {
  const Owner owner;
  expect_error([&] { owner.connections.begin(torch::randn({3, 7})); },
               "x must have shape [..., dim] with dim = 8, got [3, 7]");
  const Tensor x = torch::randn({3, 8});
  History history = owner.connections.begin(x);
  expect_error([&] { history.streams({Norm(8, 1e-6)}); }, "norms must be those of xq, xk, xv and");
  history.streams();
  expect_error([&] { history.append({}); }, "block 0 must return a tensor");
  expect_error([&] { history.append(torch::randn({2, 8})); },
               "block 0 must return the shape of its input [3, 8], got [2, 8]");
  x.add_(1);
  expect_error([&] { history.append(x); }, "block 0 changes its input in place");
  // X_0 is no stream where all streams have passed a norm, but later blocks read it all the same.
  History normed = owner.connections.begin(x);
  const Norm norm(8, 1e-6);
  const Tensor read = normed.streams({norm, norm, norm, norm})[0];
  {
    const torch::NoGradGuard no_grad;
    x.add_(read);
  }
  expect_error([&] { normed.append(x); }, "block 0 changes its input in place");
  expect_error([&] { owner.connections.begin({}); }, "x must be a tensor, got an undefined one");
}

TEST(Connections, AreUsedAfterReset) {
  Connections connections(8, 2, {});
  expect_error([&] { connections.begin(torch::randn({3, 8})); }, "begin() came before reset()");
  expect_error([&] { connections.reset_parameters(); }, "reset_parameters() came before reset()");
  expect_error([&] { connections.parameters(); }, "parameters() came before reset()");
  expect_error([] { Connections(8, 70000, {}); }, "layers must be from 0 to 65535, got 70000");
  expect_error([] { Connections(8, 2, {}, 1e-6, at::kInt); }, "tensor_options must have dtype");
}

// What a block that pulls its streams reads, beside ready streams that it norms itself.
TEST(History, NormsTheStreams) {
  torch::manual_seed(0);
  const std::vector<Norm> norms = {Norm(8, 1e-6), Norm(8, 1e-6, NormKind::kRMSNorm, 2.0),
                                   Norm(8, 1e-6), Norm(nullptr)};
  for (const ConnectionOptions& options :
       {ConnectionOptions{.multiway = true}, ConnectionOptions{}, ConnectionOptions{.dense = false},
        ConnectionOptions{.multiway = true, .ways = "qv", .pre_norm = true}}) {
    const Owner owner(options);
    const Tensor x = torch::randn({3, 8});
    History pulled = owner.connections.begin(x), ready = owner.connections.begin(x);
    for (int i = 0; i < 2; ++i) {
      const std::vector<Tensor> streams = pulled.streams(norms),
                                expected = normed(ready.streams(), norms);
      ASSERT_EQ(streams.size(), 4u);
      for (size_t way = 0; way < 4; ++way) EXPECT_TRUE(at::equal(streams[way], expected[way]));
      pulled.append(streams[3] + streams[1]);
      ready.append(expected[3] + expected[1]);
    }
    EXPECT_TRUE(at::equal(pulled.result(), ready.result()));
  }
}

TEST(History, ResidualDtypeUnderAutocast) {
  const Tensor x = torch::randn({3, 8});
  using Dtypes = std::vector<at::ScalarType>;
  // The dtypes of what two blocks that return bfloat16 and the caller read.
  const auto dtypes = [&](const ConnectionOptions& options, bool autocast) {
    const Owner owner(options);
    const auto read = [&] {
      Dtypes found;
      History history = owner.connections.begin(x);
      for (int i = 0; i < 2; ++i) {
        const Tensor stream = history.streams()[0];
        found.push_back(stream.scalar_type());
        history.append(autocast ? stream.to(at::kBFloat16) : stream * 2);
      }
      found.push_back(history.result().scalar_type());
      return found;
    };
    if (!autocast) return read();
    const Autocast guard(at::kCPU);
    return read();
  };
  const Dtypes wide(3, at::kFloat), narrow(3, at::kBFloat16),
      mixed{at::kFloat, at::kBFloat16, at::kBFloat16};
  EXPECT_EQ(dtypes({}, true), mixed);
  EXPECT_EQ(dtypes({.residual_dtype = "autocast"}, true), narrow);
  EXPECT_EQ(dtypes({.residual_dtype = "float32"}, true), wide);
  EXPECT_EQ(dtypes({.pre_norm = true, .residual_dtype = "float32"}, true), wide);
  EXPECT_EQ(dtypes({.dense = false}, true), mixed);
  EXPECT_EQ(dtypes({.dense = false, .residual_dtype = "autocast"}, true), narrow);
  for (const char* residual : {"autocast", "float32"}) {
    EXPECT_EQ(dtypes({.residual_dtype = residual}, false), wide);
  }
}

// With the history in float32 the connections compute what they compute without autocast.
TEST(History, Float32ConnectionsIgnoreAutocast) {
  torch::manual_seed(0);
  const Owner owner({.residual_dtype = "float32"});
  const Tensor x = torch::randn({3, 8});
  const auto run = [&] {
    History history = owner.connections.begin(x);
    for (int i = 0; i < 2; ++i) history.append(history.streams()[0].sin());
    return history.result();
  };
  const Tensor expected = run();
  const Autocast guard(at::kCPU);
  EXPECT_TRUE(at::equal(run(), expected));
  EXPECT_TRUE(at::autocast::is_autocast_enabled(at::kCPU));
}

// Weights of the hidden states that sum to one.
struct SoftmaxImpl : DepthAggregationImpl {
  using DepthAggregationImpl::DepthAggregationImpl;
  std::tuple<Tensor, Tensor> connection_weights(const Tensor& x, const Tensor& prior) override {
    auto [weights, same] = DepthAggregationImpl::connection_weights(x, prior);
    return {weights.softmax(-1), same};
  }
};

struct PlusOneImpl : torch::nn::Cloneable<PlusOneImpl> {
  void reset() override {}
  Tensor forward(const Tensor& x) { return x.sin() + 1; }
};
TORCH_MODULE(PlusOne);

TEST(DepthAggregationSubclass, MakesItsOwnWeights) {
  torch::manual_seed(0);
  MUDDStack stack(torch::nn::Sequential(PlusOne(), PlusOne()), 8, ConnectionOptions{}, 1e-6,
                  at::TensorOptions(), /*initialize=*/true,
                  [](const DepthAggregationOptions& options, const at::TensorOptions& tensors) {
                    return std::make_shared<SoftmaxImpl>(options, tensors);
                  });
  scramble(*stack);
  const auto p = stack->named_parameters();
  const Tensor x = torch::randn({3, 8});
  std::vector<Tensor> hiddens = {x};
  Tensor expected = x;
  for (const std::string n : {"0", "1"}) {
    hiddens.push_back(expected.sin() + 1);
    const Tensor weights =
        reference::connection_weights(hiddens.back(), p["dynamic_dense." + n + ".w1.weight"],
                                      p["dynamic_dense." + n + ".w2.weight"], p["dense_bs." + n]);
    expected = reference::depth_aggregate(hiddens, weights.softmax(-1))[0];
  }
  EXPECT_TRUE(at::allclose(stack->forward(x), expected, 1e-5, 1e-5));
  {
    const torch::NoGradGuard no_grad;  // a decoding step asks the subclass too
    EXPECT_TRUE(at::allclose(stack->forward(x), expected, 1e-5, 1e-5));
  }
  stack->forward(x).sum().backward();
  for (const Tensor& parameter : stack->parameters()) EXPECT_TRUE(parameter.grad().defined());
  expect_error([&] { stack->clone(); }, "a class that derives from DepthAggregation must override");
}

TEST(DepthAggregationSubclass, MustHaveTheOptionsThatItIsGiven) {
  const std::function<void(DepthAggregationOptions&)> changes[] = {
      [](DepthAggregationOptions& options) { options.sources = 7; },
      [](DepthAggregationOptions& options) { options.dim = 4; },
      [](DepthAggregationOptions& options) { options.eps = 0.5; },
      [](DepthAggregationOptions& options) { options.connections.pre_norm = false; }};
  for (const auto& change : changes) {
    expect_error(
        [&] {
          MUDDStack(torch::nn::Sequential(PlusOne()), 8,
                    ConnectionOptions{.pre_norm = true, .post_norm = "all"}, 1e-6,
                    at::TensorOptions(), true,
                    [&](DepthAggregationOptions options, const at::TensorOptions& tensors) {
                      change(options);
                      return std::make_shared<SoftmaxImpl>(options, tensors);
                    });
        },
        "make_aggregation must return a layer with the options that it is given");
  }
}

}  // namespace
}  // namespace muddformer
