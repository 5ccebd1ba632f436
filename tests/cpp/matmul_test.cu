// Products by cuBLASLt with their epilogues, csrc/kernels/common/matmul.h, against a float64
// reference on the CPU, without torch.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "common/matmul.h"
#include "kernels_problem.cuh"

namespace muddformer::kernels {
namespace {

enum class With { Nothing, Addition, Bias, Gelu, BiasGelu, GeluGrad, BiasGrad };

struct ProductShape {
  int64_t rows, columns, depth;
  bool a_transposed, b_transposed;
  With with = With::Nothing;
};

double gelu(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

double gelu_slope(double x) {
  return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5;
}

class Workspace {
 public:
  Workspace() { EXPECT_EQ(cudaSuccess, cudaMalloc(&data_, kBytes)); }
  ~Workspace() { cudaFree(data_); }
  static constexpr int64_t kBytes = int64_t{32} << 20;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

template <typename T, typename Out>
struct ProductProblem {
  explicit ProductProblem(const ProductShape& s)
      : shape(s),
        a(s.a_transposed ? s.depth : s.rows, s.a_transposed ? s.rows : s.depth,
          (s.a_transposed ? s.rows : s.depth) + 8, 0),
        b(s.b_transposed ? s.columns : s.depth, s.b_transposed ? s.depth : s.columns,
          s.b_transposed ? s.depth : s.columns, 0),
        d(s.rows, s.columns, s.columns, 0),
        bias(1, s.columns, s.columns, 0),
        bias_grad(1, s.rows, s.rows, 0),
        input(s.rows, s.columns, (s.columns + 7) / 8 * 8, 0) {
    a.fill(1);
    b.fill(2);
    bias.fill(3);
    if (s.with == With::Addition) d.fill(4);
    if (s.with == With::GeluGrad) input.fill(5, 0, 3);
  }
  Matmul args() const {
    Matmul m{};
    m.dtype = kDType<T>;
    m.out_dtype = kDType<Out>;
    m.rows = shape.rows;
    m.columns = shape.columns;
    m.depth = shape.depth;
    m.a = a.data();
    m.a_stride = a.stride();
    m.a_transposed = shape.a_transposed;
    m.b = b.data();
    m.b_stride = b.stride();
    m.b_transposed = shape.b_transposed;
    m.d = d.data();
    m.d_stride = d.stride();
    const With with = shape.with;
    if (with == With::Addition) m.c = d.data();
    if (with == With::Bias || with == With::BiasGelu) m.bias = bias.data();
    m.gelu = with == With::Gelu || with == With::BiasGelu;
    m.gelu_grad = with == With::GeluGrad;
    if (m.gelu || m.gelu_grad) {
      m.gelu_input = input.data();
      m.gelu_input_stride = input.stride();
    }
    if (with == With::BiasGrad) m.bias_grad = bias_grad.data();
    m.workspace = workspace.data();
    m.workspace_bytes = Workspace::kBytes;
    return m;
  }

  ProductShape shape;
  Matrix<T> a, b;
  Matrix<Out> d;
  Matrix<T> bias;
  Matrix<Out> bias_grad;
  Matrix<T> input;
  Workspace workspace;
};

template <typename T, typename Out>
void check_product(const ProductShape& s) {
  ProductProblem<T, Out> p(s);
  std::vector<double> added(s.rows * s.columns);
  for (int64_t i = 0; i < s.rows; ++i) {
    for (int64_t j = 0; j < s.columns; ++j) added[i * s.columns + j] = p.d.at(i, j);
  }
  CUDA_OK(launch_matmul(p.args(), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  p.d.download();
  p.input.download();
  p.bias_grad.download();
  ASSERT_TRUE(p.d.margin_is_poison());
  const auto a = [&](int64_t i, int64_t k) { return s.a_transposed ? p.a.at(k, i) : p.a.at(i, k); };
  const auto b = [&](int64_t k, int64_t j) { return s.b_transposed ? p.b.at(j, k) : p.b.at(k, j); };
  for (int64_t i = 0; i < s.rows; ++i) {
    double row_sum = 0, row_magnitude = 0;
    for (int64_t k = 0; k < s.depth; ++k) {
      row_sum += a(i, k);
      row_magnitude += std::abs(a(i, k));
    }
    if (s.with == With::BiasGrad) {
      ASSERT_LE(std::abs(p.bias_grad.at(0, i) - row_sum),
                1.01 * kRounding<Out> * std::abs(row_sum) + 1e-5 * row_magnitude);
    }
    for (int64_t j = 0; j < s.columns; ++j) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < s.depth; ++k) {
        sum += a(i, k) * b(k, j);
        magnitude += std::abs(a(i, k) * b(k, j));
      }
      double slack = 1e-5 * magnitude + 1e-6;
      if (s.with == With::Addition || s.with == With::GeluGrad) {
        slack +=
            1.01 * kRounding<T> * std::abs(sum);  // cuBLASLt rounds the product by itself first
      }
      if (s.with == With::Addition) sum += added[i * s.columns + j];
      if (s.with == With::Bias || s.with == With::BiasGelu) sum += p.bias.at(0, j);
      if (s.with == With::Gelu || s.with == With::BiasGelu) {
        ASSERT_LE(std::abs(p.input.at(i, j) - sum), 1.01 * kRounding<T> * std::abs(sum) + slack);
        sum = gelu(sum);
        slack = 2 * slack + 1e-3;  // its hyperbolic tangent is an approximation
      }
      if (s.with == With::GeluGrad) {
        sum *= gelu_slope(p.input.at(i, j));
        slack = 2 * slack + 1e-3 * magnitude;
      }
      ASSERT_LE(std::abs(p.d.at(i, j) - sum), 1.01 * kRounding<Out> * std::abs(sum) + slack)
          << "row " << i << ", column " << j;
    }
  }
}

class Products : public testing::TestWithParam<ProductShape> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

TEST_P(Products, OfBfloat16) {
  check_product<__nv_bfloat16, __nv_bfloat16>(GetParam());
}

TEST_P(Products, OfFloat16) {
  check_product<__half, __half>(GetParam());
}

std::vector<ProductShape> shapes() {
  std::vector<ProductShape> result;
  for (const With with : {With::Nothing, With::Addition}) {
    for (const bool a_transposed : {false, true}) {
      for (const bool b_transposed : {false, true}) {
        result.push_back({96, 160, 64, a_transposed, b_transposed, with});
        result.push_back({40, 24, 72, a_transposed, b_transposed, with});
      }
    }
  }
  // As a linear layer and its backward have them.
  for (const With with : {With::Bias, With::Gelu, With::BiasGelu}) {
    result.push_back({96, 160, 64, false, true, with});
  }
  result.push_back({96, 160, 64, false, false, With::GeluGrad});
  result.push_back({160, 64, 96, true, false, With::BiasGrad});
  return result;
}

INSTANTIATE_TEST_SUITE_P(Shapes, Products, testing::ValuesIn(shapes()));

class WideProducts : public Products {};

TEST_P(WideProducts, OfBfloat16) {
  check_product<__nv_bfloat16, float>(GetParam());
}

TEST_P(WideProducts, OfFloat16) {
  check_product<__half, float>(GetParam());
}

// Gradients of weights and of hidden states that are kept in float32.
INSTANTIATE_TEST_SUITE_P(Shapes, WideProducts,
                         testing::Values(ProductShape{160, 64, 96, true, false},
                                         ProductShape{160, 64, 96, true, false, With::Addition},
                                         ProductShape{96, 64, 160, false, false}));

TEST_F(Products, RefuseWhatTheyCannotDo) {
  ProductProblem<__nv_bfloat16, __nv_bfloat16> p({16, 16, 16, false, false});
  Matmul args = p.args();
  args.dtype = args.out_dtype = DType::Float64;
  EXPECT_EQ(cudaErrorNotSupported, launch_matmul(args, nullptr));
  args = p.args();
  args.depth = 0;
  EXPECT_EQ(cudaErrorNotSupported, launch_matmul(args, nullptr));
  args = p.args();
  args.a_stride = 3;  // less than a row
  EXPECT_EQ(cudaErrorNotSupported, launch_matmul(args, nullptr));
}

TEST_F(Products, AreCapturedByAGraphEvenTheFirst) {
  ProductProblem<__nv_bfloat16, float> p({48, 80, 112, false, true});
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(cudaSuccess, launch_matmul(p.args(), stream));
  cudaGraph_t graph;
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  CUDA_OK(cudaGraphLaunch(executable, stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  p.d.download();
  const double replayed = p.d.at(47, 79);
  CUDA_OK(launch_matmul(p.args(), stream));
  CUDA_OK(cudaStreamSynchronize(stream));
  p.d.download();
  EXPECT_EQ(replayed, p.d.at(47, 79));
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace muddformer::kernels
