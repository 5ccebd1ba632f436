#include "norm.h"

#include <ATen/ATen.h>

#include <optional>
#include <string>

#include "../ops/add_norm/add_norm.h"
#include "checks.h"
#include "operators.h"

namespace muddformer {

namespace {

void check(int64_t dim, double eps, const at::TensorOptions& options) {
  check_integer("dim", dim);
  check_real("eps", eps, 0.0, 1.0);
  check_dtype("options", options);
}

}  // namespace

NormImpl::NormImpl(int64_t dim, double eps, NormKind kind, double init, at::TensorOptions options,
                   bool initialize)
    : dim_(dim), eps_(eps), kind_(kind), init_(init), options_(options) {
  check(dim_, eps_, options_);
  reset();
  if (initialize) reset_parameters();
}

void NormImpl::reset() {
  weight = register_parameter("weight", at::empty({dim_}, options_));
  if (kind_ == NormKind::kLayerNorm) bias = register_parameter("bias", at::empty({dim_}, options_));
}

void NormImpl::reset_parameters() {
  const at::NoGradGuard no_grad;
  weight.fill_(init_);
  if (bias.defined()) bias.zero_();
}

at::Tensor NormImpl::forward(const at::Tensor& x) {
  if (kind_ == NormKind::kLayerNorm) return at::layer_norm(x, {dim_}, weight, bias, eps_);
  return at::rms_norm(x, {dim_}, weight.to(x.scalar_type()), eps_);
}

std::tuple<at::Tensor, at::Tensor> NormImpl::forward_sum(const at::Tensor& x,
                                                         const at::Tensor& residual) {
  const at::ScalarType dtype = residual.scalar_type();
  const bool x_fits = x.scalar_type() == dtype ||
                      (dtype == at::kFloat && at::isReducedFloatingType(x.scalar_type()));
  if (runs_operators(x) && fits_beside(weight, dtype) && x_fits) {
    AddNormOptions options;
    options.norm = kind_ == NormKind::kLayerNorm ? "layer" : "rms";
    options.eps = eps_;
    return add_norm(x, residual, weight, bias.defined() ? std::optional(bias) : std::nullopt,
                    options);
  }
  const at::Tensor sum = residual + x;
  return {sum, forward(sum)};
}

void NormImpl::pretty_print(std::ostream& stream) const {
  stream << (kind_ == NormKind::kLayerNorm ? "muddformer::LayerNorm(" : "muddformer::RMSNorm(")
         << dim_ << ", eps=" << eps_ << ')';
}

NormsImpl::NormsImpl(std::vector<int64_t> numbers, int64_t dim, double eps, NormKind kind,
                     double init, at::TensorOptions options, bool initialize)
    : Cloneable("muddformer::Norms"),
      dim_(dim),
      eps_(eps),
      kind_(kind),
      init_(init),
      options_(options) {
  check(dim_, eps_, options_);
  for (const int64_t number : numbers) norms_.emplace(number, nullptr);
  reset();
  if (initialize) reset_parameters();
}

void NormsImpl::reset() {
  for (auto& [number, norm] : norms_) {
    norm = register_module(std::to_string(number),
                           Norm(dim_, eps_, kind_, init_, options_, /*initialize=*/false));
  }
}

void NormsImpl::reset_parameters() {
  for (auto& [number, norm] : norms_) norm->reset_parameters();
}

Norm NormsImpl::at(int64_t number) const {
  const auto found = norms_.find(number);
  return found == norms_.end() ? Norm(nullptr) : found->second;
}

std::vector<at::Tensor> normed(at::TensorList streams, const std::vector<Norm>& norms) {
  TORCH_CHECK_VALUE(streams.size() == 1 || streams.size() == norms.size(),
                    "streams must be one tensor or ", norms.size(), ", as many as norms, got ",
                    streams.size());
  std::vector<at::Tensor> results;
  for (size_t way = 0; way < norms.size(); ++way) {
    Norm norm = norms[way];
    const at::Tensor& x = streams[streams.size() == 1 ? 0 : way];
    const bool again = streams.size() == 1 && way > 0 && norm && norms[way - 1] &&
                       norm.ptr() == norms[way - 1].ptr();
    if (again) {
      results.push_back(results.back());
    } else {
      results.push_back(norm ? norm->forward(x) : x);
    }
  }
  return results;
}

}  // namespace muddformer
