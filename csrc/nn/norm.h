// RMSNorm and LayerNorm over the last dimension; modules have the conventions of matrices.h.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "../macros.h"

namespace muddformer {

enum class NormKind { kRMSNorm, kLayerNorm };

/// RMSNorm, `x / sqrt(mean(x^2) + eps) * weight`, or LayerNorm with weight and bias, over the last
/// dimension [D].
///
/// The weight of an RMSNorm is used in the dtype of x, so that a float32 weight meets a bfloat16
/// input (as under autocast) in the fused kernel.
class MUDDFORMER_API NormImpl : public torch::nn::Cloneable<NormImpl> {
 public:
  /// @param eps added to the mean square or variance.
  /// @param init value of a fresh weight; a fresh bias is 0.
  /// @throws c10::ValueError, c10::TypeError for a dim, eps (0 to 1) or dtype that cannot be.
  NormImpl(int64_t dim, double eps, NormKind kind = NormKind::kRMSNorm, double init = 1.0,
           at::TensorOptions options = {}, bool initialize = true);
  void reset() override;
  void reset_parameters();
  /// [..., D] -> [..., D].
  at::Tensor forward(const at::Tensor& x);
  /// `residual + x` and its norm, [..., D] each. On CUDA by one operator, add_norm() of
  /// ops/add_norm.
  std::tuple<at::Tensor, at::Tensor> forward_sum(const at::Tensor& x, const at::Tensor& residual);
  void pretty_print(std::ostream& stream) const override;

  double eps() const { return eps_; }
  NormKind kind() const { return kind_; }

  /// [D], and [D] or undefined.
  at::Tensor weight, bias;

 private:
  int64_t dim_;
  double eps_;
  NormKind kind_;
  double init_;
  at::TensorOptions options_;
};
TORCH_MODULE(Norm);

/// RMSNorms or LayerNorms of one width by number, as submodules "0", "1", ... of which some may be
/// missing.
class MUDDFORMER_API NormsImpl : public torch::nn::Cloneable<NormsImpl> {
 public:
  /// @param numbers those that are there; the other arguments are those of NormImpl.
  /// @throws c10::ValueError, c10::TypeError as NormImpl does.
  NormsImpl(std::vector<int64_t> numbers, int64_t dim, double eps,
            NormKind kind = NormKind::kRMSNorm, double init = 1.0, at::TensorOptions options = {},
            bool initialize = true);
  void reset() override;
  void reset_parameters();
  /// The norm of a number, or an empty holder.
  Norm at(int64_t number) const;

 private:
  std::map<int64_t, Norm> norms_;
  int64_t dim_;
  double eps_;
  NormKind kind_;
  double init_;
  at::TensorOptions options_;
};
TORCH_MODULE(Norms);

/// Streams as their norms leave them, one for each norm; an empty holder stands for no norm.
///
/// @param streams as many as norms, each [..., D]. Or one for all: it passes a norm that follows
///   itself once.
/// @throws c10::ValueError for another number of streams.
MUDDFORMER_API std::vector<at::Tensor> normed(at::TensorList streams,
                                              const std::vector<Norm>& norms);

}  // namespace muddformer
