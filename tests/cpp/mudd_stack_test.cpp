#include <gtest/gtest.h>
#include <muddformer/nn/mudd_stack.h>
#include <torch/torch.h>

#include <string>

#include "files.h"
#include "reference.h"

namespace muddformer {
namespace {

using at::Tensor;
using testing_files::expect_error;

// A block with one stream.
struct MLPImpl : torch::nn::Cloneable<MLPImpl> {
  explicit MLPImpl(int64_t dim) : dim(dim) { reset(); }
  void reset() override { linear = register_module("linear", torch::nn::Linear(dim, dim)); }
  Tensor forward(const Tensor& x, double scale, double shift) {
    return x + scale * at::tanh(linear->forward(x)) + shift;
  }
  int64_t dim;
  torch::nn::Linear linear{nullptr};

 protected:
  FORWARD_HAS_DEFAULT_ARGS({1, torch::nn::AnyValue(1.0)}, {2, torch::nn::AnyValue(0.0)})
};
TORCH_MODULE(MLP);

// A block with four streams.
struct MixerImpl : torch::nn::Cloneable<MixerImpl> {
  explicit MixerImpl(int64_t dim) : dim(dim) { reset(); }
  void reset() override { linear = register_module("linear", torch::nn::Linear(dim, dim)); }
  Tensor forward(const Tensor& xq, const Tensor& xk, const Tensor& xv, const Tensor& xr) {
    return xr + linear->forward(xv) * at::sigmoid(xq - xk);
  }
  int64_t dim;
  torch::nn::Linear linear{nullptr};
};
TORCH_MODULE(Mixer);

template <class Block>
MUDDStack stack_of(ConnectionOptions options = {}, double eps = 1e-6) {
  options.multiway = std::is_same_v<Block, Mixer>;
  torch::nn::Sequential blocks;
  for (int i = 0; i < 4; ++i) blocks->push_back(Block(8));
  return MUDDStack(blocks, 8, options, eps);
}

void scramble(torch::nn::Module& module) {
  const torch::NoGradGuard no_grad;
  for (Tensor& parameter : module.parameters()) parameter.add_(torch::randn_like(parameter), 0.3);
}

template <class Block>
class MUDDStackOf : public testing::Test {};
using Blocks = testing::Types<MLP, Mixer>;
TYPED_TEST_SUITE(MUDDStackOf, Blocks);

TYPED_TEST(MUDDStackOf, FreshEqualsItsBlocks) {
  torch::manual_seed(0);
  for (const bool normed : {false, true}) {
    ConnectionOptions options;
    if (normed) {
      options.pre_norm = true;
      options.post_norm = "all";
    }
    MUDDStack stack = stack_of<TypeParam>(options);
    const Tensor x = torch::randn({2, 3, 8});
    Tensor expected = x;
    for (const auto& block : stack->layers->children()) {
      if constexpr (std::is_same_v<TypeParam, Mixer>) {
        expected = block->template as<Mixer>()->forward(expected, expected, expected, expected);
      } else {
        expected = block->template as<MLP>()->forward(expected, 1.0, 0.0);
      }
    }
    EXPECT_TRUE(at::allclose(stack->forward(x), expected, 1e-5, 1e-5));
  }
}

TYPED_TEST(MUDDStackOf, EqualsTheNaiveLoop) {
  torch::manual_seed(0);
  MUDDStack stack = stack_of<TypeParam>();
  scramble(*stack);
  stack->to(at::kDouble);
  const Tensor x = torch::randn({2, 3, 8}, at::kDouble);
  const auto p = stack->named_parameters();
  std::vector<Tensor> hiddens = {x}, streams(4, x);
  for (size_t i = 0; i < 4; ++i) {
    const auto block = stack->layers->children()[i];
    if constexpr (std::is_same_v<TypeParam, Mixer>) {
      hiddens.push_back(
          block->template as<Mixer>()->forward(streams[0], streams[1], streams[2], streams[3]));
    } else {
      hiddens.push_back(block->template as<MLP>()->forward(streams[0], 1.0, 0.0));
    }
    const std::string n = std::to_string(i);
    streams = reference::depth_aggregate(
        hiddens,
        reference::connection_weights(hiddens.back(), p["dynamic_dense." + n + ".w1.weight"],
                                      p["dynamic_dense." + n + ".w2.weight"], p["dense_bs." + n]));
  }
  const Tensor y = stack->forward(x);
  EXPECT_TRUE(at::allclose(y, streams.back(), 1e-10, 1e-10));
  const auto grads = torch::autograd::grad({y.square().sum()}, stack->parameters());
  const auto expected = torch::autograd::grad({streams.back().square().sum()}, stack->parameters());
  for (size_t i = 0; i < grads.size(); ++i) {
    EXPECT_TRUE(at::allclose(grads[i], expected[i], 1e-9, 1e-9)) << i;
  }
}

TYPED_TEST(MUDDStackOf, ClonesAndKeepsTheOriginal) {
  torch::manual_seed(0);
  ConnectionOptions options;
  options.pre_norm = true;
  options.post_norm = "residual";
  options.block_stride = 2;
  MUDDStack stack = stack_of<TypeParam>(options);
  scramble(*stack);
  const Tensor x = torch::randn({2, 3, 8}), expected = stack->forward(x);
  const MUDDStack clone(std::dynamic_pointer_cast<MUDDStackImpl>(stack->clone()));
  EXPECT_TRUE(at::equal(clone.ptr()->forward(x), expected));
  scramble(*clone.ptr());
  EXPECT_TRUE(at::equal(stack->forward(x), expected));
  EXPECT_FALSE(at::allclose(clone.ptr()->forward(x), expected));
}

TEST(MUDDStack, HoldsTheVeryBlocksUnderTheReleasesNames) {
  const MLP block(8);
  torch::nn::Sequential blocks(block);
  const MUDDStack stack(blocks, 8, ConnectionOptions{.pre_norm = true});
  EXPECT_EQ(stack->layers->children()[0].get(), block.ptr().get());
  const auto p = stack->named_parameters();
  for (const char* name : {"layers.0.linear.weight", "dense_bs.0", "dynamic_dense.0.w1.weight",
                           "dynamic_dense.0.norm.weight", "dynamic_dense.0.pre_norm.weight",
                           "source_norms.0.weight"}) {
    EXPECT_TRUE(p.contains(name)) << name;
  }
  EXPECT_EQ(stack->connection_parameters().size(), p.size() - 2);
}

TEST(MUDDStack, PassesArgumentsOnAndTakesAnyLeadingShape) {
  MUDDStack stack = stack_of<MLP>();
  const Tensor x = torch::randn({2, 3, 8});
  EXPECT_TRUE(at::allclose(stack->forward(x, 0.0, 0.5), x + 4 * 0.5, 1e-5, 1e-5));
  const std::vector<std::vector<int64_t>> shapes = {{8}, {3, 8}, {2, 3, 4, 8}, {0, 8}};
  for (const auto& shape : shapes) {
    EXPECT_EQ(stack->forward(torch::randn(shape)).sizes(), at::IntArrayRef(shape));
  }
  MUDDStack empty(torch::nn::Sequential(), 8);
  EXPECT_TRUE(at::equal(empty->forward(x), x));
  MUDDStack plain = stack_of<MLP>({.dense = false});
  EXPECT_TRUE(plain->connection_parameters().empty());
}

TEST(MUDDStackErrors, NameTheWidth) {
  torch::nn::Sequential blocks(torch::nn::Linear(8, 8), torch::nn::Linear(8, 4));
  MUDDStack stack(blocks, 8);
  EXPECT_THROW(stack->forward(torch::randn({2, 7})), c10::ValueError);
  EXPECT_THROW(stack->forward(torch::randn({2, 8})), c10::ValueError);
}

struct InPlaceImpl : torch::nn::Module {
  Tensor forward(Tensor x) { return x += 1; }
};
TORCH_MODULE(InPlace);

TEST(MUDDStackErrors, NameWhatIsWrong) {
  expect_error([] { MUDDStack(torch::nn::Sequential(nullptr), 8); },
               "blocks must be a Sequential, got an empty holder");
  expect_error([] { stack_of<MLP>({})->forward(Tensor()); },
               "x must be a tensor, got an undefined");
  expect_error([] { stack_of<MLP>({.ways = "qk"}); }, "ways must be 'qkvr' with multiway=false");
  expect_error([] { stack_of<MLP>({.window = 0}); }, "window must be from 1");
  expect_error([] { stack_of<MLP>({.source_stride = 0}); }, "source_stride must be from 1");
  expect_error([] { stack_of<MLP>({.post_norm = "both"}); }, "post_norm must be one of 'none', ");
  expect_error([] { stack_of<MLP>({.residual_dtype = "half"}); },
               "residual_dtype must be one of 'autocast', 'float32', got 'half'");
  expect_error([] { stack_of<MLP>({.window = 2, .flush_interval = 2}); },
               "flush_interval must be left out or 1 with a window");
  expect_error([] { MUDDStack(torch::nn::Sequential(), 0); }, "dim must be from 1");
  expect_error([] { stack_of<Mixer>({.ways = "qq"}); }, "ways must be a part of 'qkvr'");
  expect_error([] { stack_of<MLP>({}, -1); }, "eps must be more than 0 and at most 1, got -1");
  expect_error(
      [] {
        const torch::NoGradGuard no_grad;
        MUDDStack stack(torch::nn::Sequential(InPlace(), InPlace()), 8);
        stack->forward(torch::randn({2, 8}));
      },
      "block 0 changes its input in place");
}

}  // namespace
}  // namespace muddformer
