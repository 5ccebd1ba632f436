// The launchers of csrc/kernels/connection_weights against float64 on the CPU, without torch.
#include <gtest/gtest.h>

#include <string>

#include "common/device.h"
#include "connection_weights_problem.cuh"

namespace muddformer::kernels {
namespace {

template <typename T>
class ConnectionWeightsKernels : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device";
  }
  static void check(const WeightsCase& c) {
    SCOPED_TRACE(testing::PrintToString(c));
    WeightsProblem<T> p(c);
    if (!connection_weights_supported(p.shape)) {
      Device device;
      CUDA_OK(current_device(device));
      ASSERT_FALSE(device.bulk_copy) << "every shape is taken where there are clusters";
      return;
    }
    for (const bool plain : {false, true}) {
      SCOPED_TRACE(plain ? "for every GPU" : "for this GPU");
      for (const int cluster : {4, 2, 1}) {
        SCOPED_TRACE("cluster " + std::to_string(cluster));
        ASSERT_NO_FATAL_FAILURE(p.launch(nullptr, cluster, plain));
        CUDA_OK(cudaDeviceSynchronize());
        p.download();
        ASSERT_NO_FATAL_FAILURE(check_forward(p));
      }
      ASSERT_NO_FATAL_FAILURE(check_hidden_backward(p));
      ASSERT_NO_FATAL_FAILURE(check_dx(p));
      ASSERT_NO_FATAL_FAILURE(check_w1(p));
    }
  }
};

using NarrowTypes = testing::Types<__nv_bfloat16, __half>;
TYPED_TEST_SUITE(ConnectionWeightsKernels, NarrowTypes);

TYPED_TEST(ConnectionWeightsKernels, OddSizes) {
  for (const int64_t tokens : {1, 63, 65, 127, 129}) {
    ASSERT_NO_FATAL_FAILURE(this->check({tokens, 8, 8, 1}));
    ASSERT_NO_FATAL_FAILURE(this->check({tokens, 200, 24, 5}));
    ASSERT_NO_FATAL_FAILURE(this->check({tokens, 72, 136, 33, true, 1.5, true}));
  }
}

TYPED_TEST(ConnectionWeightsKernels, EveryPaddedHiddenWidth) {
  for (const int hidden : {64, 72, 128, 136, 192, 200, 256, 264, 320}) {
    ASSERT_NO_FATAL_FAILURE(this->check({100, 328, hidden, hidden * 3 / 4}));
  }
}

TYPED_TEST(ConnectionWeightsKernels, EveryOption) {
  for (const bool tanh : {false, true}) {
    for (const double cap : {0.0, 2.0}) {
      for (const bool scale : {false, true}) {
        ASSERT_NO_FATAL_FAILURE(this->check({70, 264, 64, 36, tanh, cap, scale, scale}));
      }
    }
  }
}

TYPED_TEST(ConnectionWeightsKernels, ManyOutputs) {
  for (const int outputs : {15, 16, 17, 63, 64, 65, 132, 191, 255, 256}) {
    ASSERT_NO_FATAL_FAILURE(this->check({66, 64, 192, outputs}));
  }
}

// Rings that come round often, and several tiles a block.
TYPED_TEST(ConnectionWeightsKernels, LongRuns) {
  ASSERT_NO_FATAL_FAILURE(this->check({300, 2048, 64, 36}));
  ASSERT_NO_FATAL_FAILURE(this->check({9000, 40, 64, 12}));
  ASSERT_NO_FATAL_FAILURE(this->check({500, 1096, 128, 68, false, 0, true}));
}

TYPED_TEST(ConnectionWeightsKernels, NoTokens) {
  WeightsProblem<TypeParam> p({0, 64, 64, 12});
  ConnectionWeightsForward args = p.forward(0);
  EXPECT_EQ(cudaSuccess, launch_connection_weights_forward(args, nullptr));
  EXPECT_EQ(cudaSuccess, launch_connection_weights_hidden_backward({p.shape}, nullptr));
  EXPECT_EQ(
      cudaSuccess,
      launch_connection_weights_input_backward(
          {p.shape, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1}, nullptr));
}

TYPED_TEST(ConnectionWeightsKernels, SizesOutOfRange) {
  WeightsProblem<TypeParam> p({64, 64, 64, 12});
  const auto with = [&p](auto member, auto value) {
    ConnectionWeightsForward args = p.forward(0);
    args.shape.*member = value;
    EXPECT_FALSE(connection_weights_supported(args.shape));
    return launch_connection_weights_forward(args, nullptr);
  };
  EXPECT_EQ(cudaErrorInvalidValue, with(&ConnectionWeightsShape::hidden, kMaxHidden + 8));
  EXPECT_EQ(cudaErrorInvalidValue, with(&ConnectionWeightsShape::hidden, 12));
  EXPECT_EQ(cudaErrorInvalidValue, with(&ConnectionWeightsShape::outputs, kMaxOutputs + 1));
  EXPECT_EQ(cudaErrorInvalidValue, with(&ConnectionWeightsShape::outputs, 0));
  EXPECT_EQ(cudaErrorInvalidValue, with(&ConnectionWeightsShape::dim, int64_t{60}));
  EXPECT_EQ(cudaErrorInvalidValue, with(&ConnectionWeightsShape::dtype, DType::Float32));
  ConnectionWeightsForward args = p.forward(3);
  EXPECT_EQ(cudaErrorInvalidValue, launch_connection_weights_forward(args, nullptr));
  args = p.forward(0);
  args.x = p.x.data() + 1;
  EXPECT_EQ(cudaErrorMisalignedAddress, launch_connection_weights_forward(args, nullptr));
}

TYPED_TEST(ConnectionWeightsKernels, RepeatsBitForBit) {
  WeightsProblem<TypeParam> p({1500, 1024, 128, 68, false, 3.0, true});
  ASSERT_NO_FATAL_FAILURE(p.launch(nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  const auto first = p.results();
  for (int run = 0; run < 50; ++run) {
    ASSERT_NO_FATAL_FAILURE(p.launch(nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    ASSERT_EQ(first, p.results()) << "run " << run;
  }
}

// What is not wanted is left alone, and the rest comes out the same.
TYPED_TEST(ConnectionWeightsKernels, FrozenInputs) {
  for (const bool plain : {false, true}) {
    WeightsProblem<TypeParam> p({700, 392, 128, 36, false, 0, false});
    ASSERT_NO_FATAL_FAILURE(p.launch(nullptr, 0, plain));
    CUDA_OK(cudaDeviceSynchronize());
    const auto all = p.results();
    const auto input_backward = [&](void* dx, float* partials) {
      return launch_connection_weights_input_backward(
          {p.shape, p.x.data(), p.grad_x.data(), p.w1.data(), p.e.data(), p.coefficient.data(), dx,
           partials, p.splits, plain},
          nullptr);
    };
    p.dx.fill(8);
    p.w1_partials->fill(8);
    CUDA_OK(input_backward(p.dx.data(), nullptr));
    p.dw1.fill(8);
    CUDA_OK(input_backward(nullptr, p.w1_partials->data()));
    ConnectionWeightsReduce reduce{};
    reduce.shape = p.shape;
    reduce.w1_partials = p.w1_partials->data();
    reduce.splits = p.splits;
    reduce.dw1 = p.dw1.data();
    CUDA_OK(launch_connection_weights_reduce(reduce, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    EXPECT_EQ(all, p.results());

    CUDA_OK(launch_connection_weights_hidden_backward(
        {p.shape, p.grad_weights.data(), nullptr, p.w2.data(), p.hidden.data(), p.factor.data(),
         p.e.data(), p.coefficient.data(), nullptr, p.prior_partials->data()},
        nullptr));
    reduce.w1_partials = nullptr;
    reduce.prior_partials = p.prior_partials->data();
    reduce.groups = p.groups;
    reduce.dprior = p.dprior.data();
    reduce.prior_float32 = true;
    p.dprior.fill(8);
    CUDA_OK(launch_connection_weights_reduce(reduce, nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    EXPECT_EQ(all, p.results());
  }
}

TYPED_TEST(ConnectionWeightsKernels, CapturedInAGraph) {
  WeightsProblem<TypeParam> p({300, 512, 64, 36, false, 0, true});
  ASSERT_NO_FATAL_FAILURE(p.launch(nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  const auto launched = p.results();
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  ASSERT_NO_FATAL_FAILURE(p.launch(stream));
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  for (Array<TypeParam>* a : {&p.weights, &p.hidden, &p.e, &p.dx, &p.dw1}) a->fill(9);
  CUDA_OK(cudaGraphLaunch(executable, stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  EXPECT_EQ(launched, p.results());
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace muddformer::kernels
