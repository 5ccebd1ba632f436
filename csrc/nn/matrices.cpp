#include "matrices.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <optional>

#include "../ops/linear/linear.h"
#include "checks.h"
#include "operators.h"

namespace muddformer {

LinearImpl::LinearImpl(int64_t in_features, int64_t out_features, bool with_bias, double std,
                       at::TensorOptions options, bool initialize)
    : in_features_(in_features),
      out_features_(out_features),
      with_bias_(with_bias),
      std_(std),
      options_(options) {
  check_integer("in_features", in_features_);
  check_integer("out_features", out_features_);
  check_dtype("options", options_);
  reset();
  if (initialize) reset_parameters();
}

void LinearImpl::reset() {
  weight = register_parameter("weight", at::empty({out_features_, in_features_}, options_));
  if (with_bias_) bias = register_parameter("bias", at::empty({out_features_}, options_));
}

void LinearImpl::reset_parameters() {
  const at::NoGradGuard no_grad;
  weight.normal_(0, std_);
  if (with_bias_) bias.zero_();
}

at::Tensor LinearImpl::forward(const at::Tensor& x, const at::Tensor& residual) {
  const auto given = [](const at::Tensor& t) {
    return t.defined() ? std::optional(t) : std::nullopt;
  };
  if (runs_operators(x)) {
    const at::ScalarType dtype = at::autocast::is_autocast_enabled(at::kCUDA)
                                     ? at::autocast::get_autocast_dtype(at::kCUDA)
                                     : x.scalar_type();
    if (!residual.defined() || fits_beside(residual, dtype)) {
      return linear(x, weight, given(bias), given(residual));
    }
  }
  const at::Tensor y = at::linear(x, weight, given(bias));
  return residual.defined() ? residual + y : y;
}

void LinearImpl::pretty_print(std::ostream& stream) const {
  stream << "muddformer::Linear(in_features=" << in_features_ << ", out_features=" << out_features_
         << ", bias=" << (with_bias_ ? "true" : "false") << ')';
}

EmbeddingImpl::EmbeddingImpl(int64_t rows, int64_t dim, double std, at::TensorOptions options,
                             bool initialize)
    : rows_(rows), dim_(dim), std_(std), options_(options) {
  check_integer("rows", rows_);
  check_integer("dim", dim_);
  check_dtype("options", options_);
  reset();
  if (initialize) reset_parameters();
}

void EmbeddingImpl::reset() {
  weight = register_parameter("weight", at::empty({rows_, dim_}, options_));
}

void EmbeddingImpl::reset_parameters() {
  const at::NoGradGuard no_grad;
  weight.normal_(0, std_);
}

at::Tensor EmbeddingImpl::forward(const at::Tensor& ids) {
  return at::embedding(weight, ids);
}

void EmbeddingImpl::pretty_print(std::ostream& stream) const {
  stream << "muddformer::Embedding(" << rows_ << ", " << dim_ << ')';
}

}  // namespace muddformer
