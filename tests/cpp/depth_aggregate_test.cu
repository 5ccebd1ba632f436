// The launchers of csrc/kernels/depth_aggregate against a float64 reference on the CPU: every path,
// dtype and odd shape, without torch.
#include <gtest/gtest.h>

#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "kernels_problem.cuh"

namespace muddformer::kernels {
namespace {

bool has_path(Path path) {
  int device = 0;
  int major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return path != Path::Ring || major >= 9;
}

class Kernels : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device";
  }
};

template <typename T>
class KernelsOf : public Kernels {
 protected:
  void check(const Shape& shape, std::initializer_list<Path> paths) {
    for (const Path path : paths) {
      if (!has_path(path)) continue;
      SCOPED_TRACE(testing::PrintToString(shape) + ", path " +
                   std::to_string(static_cast<int>(path)));
      ASSERT_NO_FATAL_FAILURE(check_forward<T>(shape, path));
      ASSERT_NO_FATAL_FAILURE(check_backward<T>(shape, path));
    }
  }
};

template <typename T>
class FastKernelsOf : public KernelsOf<T> {};

using AllTypes = testing::Types<float, double, __nv_bfloat16, __half>;
using FastTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(KernelsOf, AllTypes);
TYPED_TEST_SUITE(FastKernelsOf, FastTypes);

TYPED_TEST(KernelsOf, AnyShape) {
  for (const int ways : {1, 2, 3, 4, 5, 6}) {
    for (const int sources : {1, 2, 5}) {
      for (const int64_t dim : {1, 7, 33, 96, 321}) {
        ASSERT_NO_FATAL_FAILURE(
            this->check({3, dim, sources, ways}, {Path::Scalar, Path::Automatic}));
      }
    }
  }
}

TYPED_TEST(KernelsOf, ManySources) {
  for (const int sources : {63, 64, 65, 130, 200}) {
    for (const int ways : {1, 4}) {
      ASSERT_NO_FATAL_FAILURE(
          this->check({5, 264, sources, ways}, {Path::Scalar, Path::Automatic}));
    }
  }
}

TYPED_TEST(KernelsOf, AnyAlignment) {
  const int64_t vector = 16 / sizeof(TypeParam);
  for (const int64_t dim : {64, 65}) {
    for (const int64_t gap : {int64_t{1}, vector, int64_t{40}}) {
      for (const int64_t offset : {int64_t{0}, int64_t{1}, vector}) {
        ASSERT_NO_FATAL_FAILURE(
            this->check({4, dim, 6, 4, gap, offset}, {Path::Scalar, Path::Automatic}));
      }
    }
  }
}

TYPED_TEST(KernelsOf, OnePriorAndHoles) {
  for (const int ways : {1, 2, 3, 4, 6}) {
    ASSERT_NO_FATAL_FAILURE(
        this->check({9, 72, 7, ways, 0, 0, true, true}, {Path::Scalar, Path::Automatic}));
  }
}

TYPED_TEST(KernelsOf, ManyTokens) {
  for (const int64_t tokens : {1, 2, 1000, 5000}) {
    ASSERT_NO_FATAL_FAILURE(this->check({tokens, 16, 3, 2}, {Path::Scalar, Path::Automatic}));
  }
}

TYPED_TEST(FastKernelsOf, EveryWidth) {
  for (const int64_t dim : {8, 64, 256, 384, 768, 1000, 1024, 2048, 2056, 2560, 4096, 8192}) {
    ASSERT_NO_FATAL_FAILURE(this->check({7, dim, 9, 4}, {Path::Vector, Path::Ring}));
  }
}

TYPED_TEST(FastKernelsOf, EveryNumberOfSourcesAndWays) {
  for (const int ways : {1, 2, 3, 4}) {
    for (const int sources : {1, 2, 3, 4, 5, 8, 13, 17, 33, 63, 64, 65, 128}) {
      ASSERT_NO_FATAL_FAILURE(this->check({5, 512, sources, ways}, {Path::Vector, Path::Ring}));
    }
  }
}

TYPED_TEST(FastKernelsOf, StridesPriorAndHoles) {
  for (const int ways : {1, 2, 3, 4}) {
    for (const bool one_prior : {false, true}) {
      ASSERT_NO_FATAL_FAILURE(
          this->check({6, 2560, 11, ways, 16, 8, one_prior, true}, {Path::Vector, Path::Ring}));
    }
  }
}

TYPED_TEST(FastKernelsOf, DeferredSources) {
  for (const int ways : {1, 2, 3, 4}) {
    for (const int deferred : {1, 2, 7, 11}) {
      for (const int64_t dim : {8, 248, 2560}) {
        ASSERT_NO_FATAL_FAILURE(this->check({6, dim, 11, ways, 16, 0, false, true, deferred},
                                            {Path::Scalar, Path::Vector, Path::Ring}));
      }
    }
    ASSERT_NO_FATAL_FAILURE(this->check({3, 512, 80, ways, 0, 0, true, false, 70}, {Path::Ring}));
  }
}

// Blocks that serve several tokens, so that every ring comes round many times.
TYPED_TEST(FastKernelsOf, LongRuns) {
  ASSERT_NO_FATAL_FAILURE(this->check({3000, 256, 5, 4}, {Path::Vector, Path::Ring}));
  ASSERT_NO_FATAL_FAILURE(this->check({12000, 32, 2, 3}, {Path::Vector, Path::Ring}));
  ASSERT_NO_FATAL_FAILURE(this->check({1100, 1024, 33, 4}, {Path::Ring}));
}

__global__ void count_differences(const unsigned char* a, const unsigned char* b, size_t bytes,
                                  int* count) {
  for (size_t i = blockIdx.x * static_cast<size_t>(blockDim.x) + threadIdx.x; i < bytes;
       i += static_cast<size_t>(gridDim.x) * blockDim.x) {
    if (a[i] != b[i]) atomicAdd(count, 1);
  }
}

// A race shows as a result that moves now and then, first at few sources: hence the many runs.
TYPED_TEST(FastKernelsOf, RepeatsBitForBit) {
  constexpr int kRuns = 200;
  constexpr int64_t kTokens = 3000;
  constexpr int64_t kDim = 1024;
  int* count = nullptr;
  CUDA_OK(cudaMallocHost(&count, sizeof(int)));
  for (const Path path : {Path::Vector, Path::Ring}) {
    if (!has_path(path)) continue;
    for (const int sources : {2, 5, 9}) {
      Problem<TypeParam> p({kTokens, kDim, sources, 4});
      std::vector<std::pair<void*, size_t>> outputs;
      for (void* y : p.y_pointers) outputs.emplace_back(y, kTokens * kDim * sizeof(TypeParam));
      for (void* grad : p.grad_out_pointers)
        outputs.emplace_back(grad, kTokens * kDim * sizeof(TypeParam));
      outputs.emplace_back(p.dw.data(), kTokens * 4 * sources * sizeof(TypeParam));
      std::vector<unsigned char*> first;
      for (int run = 0; run < kRuns; ++run) {
        for (const auto& [data, bytes] : outputs) CUDA_OK(cudaMemsetAsync(data, 0xff, bytes));
        *count = 0;
        CUDA_OK(launch_aggregate_forward(p.forward(path), nullptr));
        CUDA_OK(launch_aggregate_backward(p.backward(path), nullptr));
        for (size_t i = 0; i < outputs.size(); ++i) {
          const auto& [data, bytes] = outputs[i];
          if (run == 0) {
            first.emplace_back();
            CUDA_OK(cudaMalloc(&first[i], bytes));
            CUDA_OK(cudaMemcpyAsync(first[i], data, bytes, cudaMemcpyDeviceToDevice));
          }
          count_differences<<<1024, 256>>>(first[i], static_cast<unsigned char*>(data), bytes,
                                           count);
        }
        CUDA_OK(cudaDeviceSynchronize());
        ASSERT_EQ(0, *count) << "bytes differ in run " << run << ", S " << sources << ", path "
                             << static_cast<int>(path);
      }
      for (unsigned char* copy : first) CUDA_OK(cudaFree(copy));
    }
  }
  CUDA_OK(cudaFreeHost(count));
}

TEST_F(Kernels, SameSourceTwice) {
  Problem<float> p({4, 128, 2, 1});
  p.x_pointers[1] = p.x_pointers[0];
  CUDA_OK(launch_aggregate_forward(p.forward(Path::Automatic), nullptr));
  p.y[0]->download();
  for (int64_t t = 0; t < 4; ++t) {
    for (int64_t i = 0; i < 128; ++i) {
      const double exact = (p.weight(t, 0, 0) + p.weight(t, 0, 1)) * p.x[0]->at(t, i);
      ASSERT_NO_FATAL_FAILURE(expect_near<float>(p.y[0]->at(t, i), exact, 2, "Y", t, i));
    }
  }
}

TEST_F(Kernels, NoTokens) {
  const void* nothing[1] = {nullptr};
  void* nowhere[1] = {nullptr};
  const int64_t stride[1] = {8};
  const AggregateForward forward{DType::Float32, 0, 8, 1, 1, nothing, stride, nullptr, 1, nowhere};
  const AggregateBackward backward{DType::Float32, 0, 8,       1,       1,       nothing, stride,
                                   nullptr,        1, nothing, nothing, nowhere, nullptr};
  EXPECT_EQ(cudaSuccess, launch_aggregate_forward(forward, nullptr));
  EXPECT_EQ(cudaSuccess, launch_aggregate_backward(backward, nullptr));
}

TEST_F(Kernels, SizesOutOfRange) {
  Problem<float> p({4, 128, 2, 1});
  AggregateForward forward = p.forward(Path::Automatic);
  for (const auto member : {&AggregateForward::sources, &AggregateForward::ways}) {
    for (const int bad : {0, -1, kMaxSources + 1}) {
      AggregateForward args = forward;
      args.*member = bad;
      EXPECT_EQ(cudaErrorInvalidValue, launch_aggregate_forward(args, nullptr));
    }
  }
  AggregateBackward backward = p.backward(Path::Automatic);
  backward.dim = 0;
  EXPECT_EQ(cudaErrorInvalidValue, launch_aggregate_backward(backward, nullptr));
  forward.dtype = DType::Float64;
  forward.path = Path::Vector;
  EXPECT_EQ(cudaErrorNotSupported, launch_aggregate_forward(forward, nullptr));
}

TEST_F(Kernels, CapturedInAGraph) {
  Problem<__nv_bfloat16> p({300, 2048, 9, 4});
  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  CUDA_OK(cudaDeviceSynchronize());  // the stream does not wait for the uploads
  CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  CUDA_OK(launch_aggregate_forward(p.forward(Path::Automatic), stream));
  CUDA_OK(launch_aggregate_backward(p.backward(Path::Automatic), stream));
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  const auto results = [&] {
    p.y[1]->download();
    p.grad_out[3]->download();
    p.dw.download();
    return std::vector<std::vector<__nv_bfloat16>>{p.y[1]->host(), p.grad_out[3]->host(),
                                                   p.dw.host()};
  };
  CUDA_OK(cudaGraphLaunch(executable, stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto replayed = results();
  for (void* out : {p.y_pointers[1], p.grad_out_pointers[3]}) {
    CUDA_OK(cudaMemsetAsync(out, 0xff, 300 * 2048 * 2, stream));
  }
  CUDA_OK(launch_aggregate_forward(p.forward(Path::Automatic), stream));
  CUDA_OK(launch_aggregate_backward(p.backward(Path::Automatic), stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto launched = results();
  for (size_t i = 0; i < launched.size(); ++i) {
    EXPECT_EQ(0, std::memcmp(replayed[i].data(), launched[i].data(), launched[i].size() * 2));
  }
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaStreamDestroy(stream));
}

__global__ void fill_noise(__nv_bfloat16* to, int64_t count, uint64_t tensor) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    to[i] = __float2bfloat16(static_cast<float>(noise(tensor, i)));
  }
}

// Offsets of more than 2^31 elements: a few rows are compared, the last ones among them.
class HugeKernels : public Kernels, public testing::WithParamInterface<Path> {};

TEST_P(HugeKernels, MoreThan2To31Elements) {
  const Path path = GetParam();
  if (!has_path(path)) GTEST_SKIP() << "needs compute capability 9.0";
  constexpr int64_t kDim = 2048;
  constexpr int64_t kTokens = (int64_t{1} << 20) + 4099;
  constexpr int kSources = 2;
  size_t available = 0;
  size_t total = 0;
  CUDA_OK(cudaMemGetInfo(&available, &total));
  if (available < 9 * kTokens * kDim * 2) GTEST_SKIP() << "needs 39 GB of free memory";
  // x0, x1, g0, dx0, dx1, dy, y
  std::vector<__nv_bfloat16*> tensors(7);
  for (size_t i = 0; i < tensors.size(); ++i) {
    CUDA_OK(cudaMalloc(&tensors[i], kTokens * kDim * 2));
    fill_noise<<<2048, 256>>>(tensors[i], kTokens * kDim, i);
  }
  __nv_bfloat16* w = nullptr;
  __nv_bfloat16* dw = nullptr;
  CUDA_OK(cudaMalloc(&w, kTokens * kSources * 2));
  CUDA_OK(cudaMalloc(&dw, kTokens * kSources * 2));
  fill_noise<<<2048, 256>>>(w, kTokens * kSources, 7);
  const void* x[] = {tensors[0], tensors[1]};
  const void* grad_in[] = {tensors[2], nullptr};
  void* grad_out[] = {tensors[3], tensors[4]};
  const void* dy[] = {tensors[5]};
  void* y[] = {tensors[6]};
  const int64_t stride[] = {kDim, kDim};
  CUDA_OK(launch_aggregate_forward({DType::BFloat16, kTokens, kDim, 2, 1, x, stride, w, 2, y, path},
                                   nullptr));
  CUDA_OK(launch_aggregate_backward(
      {DType::BFloat16, kTokens, kDim, 2, 1, x, stride, w, 2, dy, grad_in, grad_out, dw, path},
      nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  const auto noise_of = [](uint64_t tensor, int64_t index) {
    return value_of(make<__nv_bfloat16>(noise(tensor, index)));
  };
  std::vector<__nv_bfloat16> row(kDim);
  for (const int64_t t : {int64_t{0}, int64_t{1} << 20, kTokens - 2, kTokens - 1}) {
    const double w0 = noise_of(7, t * 2);
    const double w1 = noise_of(7, t * 2 + 1);
    double dot = 0;
    for (int64_t i = 0; i < kDim; ++i) dot += noise_of(5, t * kDim + i) * noise_of(1, t * kDim + i);
    CUDA_OK(cudaMemcpy(row.data(), tensors[6] + t * kDim, kDim * 2, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < kDim; ++i) {
      const double exact = w0 * noise_of(0, t * kDim + i) + w1 * noise_of(1, t * kDim + i);
      ASSERT_NO_FATAL_FAILURE(expect_near<__nv_bfloat16>(value_of(row[i]), exact, 2, "Y", t, i));
    }
    CUDA_OK(cudaMemcpy(row.data(), tensors[3] + t * kDim, kDim * 2, cudaMemcpyDeviceToHost));
    for (int64_t i = 0; i < kDim; ++i) {
      const double exact = noise_of(2, t * kDim + i) + w0 * noise_of(5, t * kDim + i);
      ASSERT_NO_FATAL_FAILURE(expect_near<__nv_bfloat16>(value_of(row[i]), exact, 2, "dX", t, i));
    }
    CUDA_OK(cudaMemcpy(row.data(), dw + t * 2, 4, cudaMemcpyDeviceToHost));
    ASSERT_NO_FATAL_FAILURE(expect_near<__nv_bfloat16>(value_of(row[1]), dot, kDim, "dw", t, 1));
  }
  for (__nv_bfloat16* tensor : tensors) CUDA_OK(cudaFree(tensor));
  CUDA_OK(cudaFree(w));
  CUDA_OK(cudaFree(dw));
}

INSTANTIATE_TEST_SUITE_P(Paths, HugeKernels,
                         testing::Values(Path::Scalar, Path::Vector, Path::Ring));

}  // namespace
}  // namespace muddformer::kernels
