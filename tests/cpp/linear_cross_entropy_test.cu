// The launcher of csrc/kernels/linear_cross_entropy against a float64 reference on the CPU, without
// torch.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kernels_problem.cuh"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace muddformer::kernels {
namespace {

// An array on the device.
template <typename T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size() * sizeof(T)) {
    EXPECT_EQ(cudaSuccess, cudaMalloc(&data_, size_));
    EXPECT_EQ(cudaSuccess, cudaMemcpy(data_, values.data(), size_, cudaMemcpyHostToDevice));
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }
  T* data() const { return data_; }
  std::vector<T> download() const {
    std::vector<T> values(size_ / sizeof(T));
    EXPECT_EQ(cudaSuccess, cudaMemcpy(values.data(), data_, size_, cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  size_t size_;
  T* data_ = nullptr;
};

struct LossShape {
  int64_t tokens;
  int64_t classes;
  float smoothing = 0;
  float z_loss = 0;
  bool weighted = false;  // the losses have gradients other than 1
};

template <typename T>
struct LossProblem {
  explicit LossProblem(const LossShape& s)
      : shape(s),
        stride((s.classes + 7) / 8 * 8),
        logits(s.tokens, s.classes, stride, 0),
        losses(std::vector<float>(s.tokens, NAN)),
        targets(chosen(s)),
        factors(weights(s)),
        targets_there(targets),
        factors_there(factors) {
    logits.fill(1, 1, 6);
  }
  static std::vector<int64_t> chosen(const LossShape& s) {
    std::vector<int64_t> result;
    for (int64_t t = 0; t < s.tokens; ++t) {
      result.push_back(t % 5 == 3 ? -100 : (t * 7919 + s.classes - 1) % s.classes);
    }
    return result;
  }
  static std::vector<float> weights(const LossShape& s) {
    std::vector<float> result;
    for (int64_t t = 0; t < s.tokens; ++t) result.push_back(static_cast<float>(noise(9, t)));
    return result;
  }
  TokenLosses args(bool gradients = true) const {
    return {kDType<T>,
            shape.tokens,
            shape.classes,
            stride,
            logits.data(),
            targets_there.data(),
            shape.weighted ? factors_there.data() : nullptr,
            losses.data(),
            -100,
            shape.smoothing,
            shape.z_loss,
            gradients};
  }

  LossShape shape;
  int64_t stride;
  Matrix<T> logits;
  Array<float> losses;
  std::vector<int64_t> targets;
  std::vector<float> factors;
  Array<int64_t> targets_there;
  Array<float> factors_there;
};

template <typename T>
void check_losses(const LossShape& s, bool gradients = true) {
  LossProblem<T> p(s);
  std::vector<double> x(s.tokens * s.classes);
  for (int64_t t = 0; t < s.tokens; ++t) {
    for (int64_t v = 0; v < s.classes; ++v) x[t * s.classes + v] = p.logits.at(t, v);
  }
  CUDA_OK(launch_token_losses(p.args(gradients), nullptr));
  CUDA_OK(cudaDeviceSynchronize());
  p.logits.download();
  ASSERT_TRUE(p.logits.margin_is_poison());
  const std::vector<float> losses = p.losses.download();
  for (int64_t t = 0; t < s.tokens; ++t) {
    const double* row = x.data() + t * s.classes;
    const bool counts = p.targets[t] != -100;
    double exps = 0, total = 0;
    for (int64_t v = 0; v < s.classes; ++v) {
      exps += std::exp(row[v]);
      total += row[v];
    }
    const double lse = std::log(exps), share = s.smoothing / static_cast<double>(s.classes);
    const double loss =
        counts ? lse - (1 - s.smoothing) * row[p.targets[t]] - share * total + s.z_loss * lse * lse
               : 0;
    ASSERT_LE(std::abs(losses[t] - loss), 1e-5 * (1 + std::abs(lse))) << "token " << t;
    const double g = !counts ? 0 : s.weighted ? p.factors[t] : 1;
    for (int64_t v = 0; v < s.classes; ++v) {
      const double hit = v == p.targets[t] ? 1 - s.smoothing : 0;
      const double share_of = std::exp(row[v] - lse) * (1 + 2 * s.z_loss * lse);
      const double expected = gradients ? g * (share_of - share - hit) : row[v];
      const double magnitude = std::abs(g) * (share_of + share + hit);
      ASSERT_LE(std::abs(p.logits.at(t, v) - expected),
                1.01 * kRounding<T> * std::abs(expected) + 1e-5 * magnitude + 0x1p-25)
          << "token " << t << ", class " << v;
    }
  }
}

template <typename T>
class TokenLossesOf : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
};

using LogitTypes = testing::Types<float, __nv_bfloat16, __half>;
TYPED_TEST_SUITE(TokenLossesOf, LogitTypes);

TYPED_TEST(TokenLossesOf, EveryNumberOfClasses) {
  for (const int64_t classes : {1, 2, 7, 8, 9, 31, 64, 255, 256, 1000, 4095, 8192, 32001, 50304}) {
    ASSERT_NO_FATAL_FAILURE(check_losses<TypeParam>({6, classes}));
    ASSERT_NO_FATAL_FAILURE(check_losses<TypeParam>({6, classes, 0.1f, 1e-3f, true}));
  }
}

TYPED_TEST(TokenLossesOf, RowsLongerThanSharedMemory) {
  ASSERT_NO_FATAL_FAILURE(check_losses<TypeParam>({4, 131075, 0.1f, 1e-3f, true}));
}

TYPED_TEST(TokenLossesOf, ManyTokens) {
  ASSERT_NO_FATAL_FAILURE(check_losses<TypeParam>({3001, 40, 0.1f, 0, true}));
}

TYPED_TEST(TokenLossesOf, LogitsStayWhereNoGradientsAreWanted) {
  ASSERT_NO_FATAL_FAILURE(check_losses<TypeParam>({6, 1000, 0.1f, 1e-3f}, false));
}

TYPED_TEST(TokenLossesOf, RepeatsBitForBit) {
  std::vector<TypeParam> first;
  std::vector<float> first_losses;
  for (int run = 0; run < 10; ++run) {
    LossProblem<TypeParam> p({400, 5000, 0.1f, 1e-3f, true});
    CUDA_OK(launch_token_losses(p.args(), nullptr));
    CUDA_OK(cudaDeviceSynchronize());
    p.logits.download();
    const std::vector<float> losses = p.losses.download();
    if (run == 0) {
      first = p.logits.host();
      first_losses = losses;
    }
    ASSERT_EQ(first_losses, losses);
    ASSERT_EQ(0,
              std::memcmp(first.data(), p.logits.host().data(), first.size() * sizeof(TypeParam)));
  }
}

TYPED_TEST(TokenLossesOf, RefusesWhatItCannotDo) {
  LossProblem<TypeParam> p({4, 64});
  TokenLosses args = p.args();
  args.dtype = DType::Float64;
  EXPECT_EQ(cudaErrorNotSupported, launch_token_losses(args, nullptr));
  args = p.args();
  args.stride = 65;
  EXPECT_EQ(cudaErrorNotSupported, launch_token_losses(args, nullptr));
  args = p.args();
  args.stride = 63;
  EXPECT_EQ(cudaErrorInvalidValue, launch_token_losses(args, nullptr));
}

}  // namespace
}  // namespace muddformer::kernels
