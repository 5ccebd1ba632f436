// Matrices as modules: a linear map and a table of rows.
//
// Every module takes the dtype and device of its parameters, and `initialize`: false leaves the
// parameters without values, for a loader that fills them all. reset() makes them anew without
// values (as clone() needs it), reset_parameters() gives them their initial ones.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>

#include "../macros.h"

namespace muddformer {

/// `x weight^T + bias`, [..., in] -> [..., out].
class MUDDFORMER_API LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  /// @param std standard deviation of a fresh weight; a fresh bias is 0.
  /// @throws c10::ValueError, c10::TypeError for a size or dtype that cannot be.
  LinearImpl(int64_t in_features, int64_t out_features, bool with_bias, double std,
             at::TensorOptions options = {}, bool initialize = true);
  void reset() override;
  void reset_parameters();
  /// [..., in] -> [..., out].
  ///
  /// @param residual [..., out], added to the result; undefined: none. On CUDA by one operator,
  ///   linear() of ops/linear.
  at::Tensor forward(const at::Tensor& x, const at::Tensor& residual = {});
  void pretty_print(std::ostream& stream) const override;

  /// [out, in], and [out] or undefined.
  at::Tensor weight, bias;

 private:
  int64_t in_features_, out_features_;
  bool with_bias_;
  double std_;
  at::TensorOptions options_;
};
TORCH_MODULE(Linear);

/// Rows of a table, int64 or int32 [...] -> [..., D].
class MUDDFORMER_API EmbeddingImpl : public torch::nn::Cloneable<EmbeddingImpl> {
 public:
  /// @param rows number of rows; D is `dim`.
  /// @param std standard deviation of a fresh weight.
  /// @throws c10::ValueError, c10::TypeError for a size or dtype that cannot be.
  EmbeddingImpl(int64_t rows, int64_t dim, double std, at::TensorOptions options = {},
                bool initialize = true);
  void reset() override;
  void reset_parameters();
  /// @throws c10::IndexError for an id that is no row (on CUDA: torch's device-side assertion).
  at::Tensor forward(const at::Tensor& ids);
  void pretty_print(std::ostream& stream) const override;

  /// [rows, D].
  at::Tensor weight;

 private:
  int64_t rows_, dim_;
  double std_;
  at::TensorOptions options_;
};
TORCH_MODULE(Embedding);

}  // namespace muddformer
