#include "depth_aggregation.h"

#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <algorithm>
#include <cmath>
#include <typeinfo>
#include <utility>

#include "../ops/common/checks.h"
#include "../ops/connection_weights/connection_weights.h"
#include "../ops/depth_aggregate/depth_aggregate.h"
#include "../ops/depth_aggregate_norm/depth_aggregate_norm.h"
#include "../ops/depth_aggregation_step/depth_aggregation_step.h"
#include "checks.h"

namespace muddformer {

DepthAggregationImpl::DepthAggregationImpl(DepthAggregationOptions given,
                                           at::TensorOptions tensor_options, bool initialize)
    : Cloneable("muddformer::DepthAggregation"),
      options(std::move(given)),
      tensor_options_(tensor_options) {
  check_integer("dim", options.dim);
  constexpr int64_t kLargestCount = int64_t{1} << 16;
  check_integer("sources", options.sources, kLargestCount);
  if (auto* ways = std::get_if<std::string>(&options.ways)) {
    *ways = check_ways(*ways);
  } else {
    check_integer("ways", std::get<int64_t>(options.ways), kLargestCount);
  }
  check_integer("expand", options.expand, kLargestCount);
  check_real("eps", options.eps, 0.0, 1.0);
  options.connections = options.connections.checked();
  check_dtype("tensor_options", tensor_options_);
  reset();
  if (initialize) reset_parameters();
}

int64_t DepthAggregationImpl::num_ways() const {
  const auto* ways = std::get_if<std::string>(&options.ways);
  return ways != nullptr ? static_cast<int64_t>(ways->size()) : std::get<int64_t>(options.ways);
}

void DepthAggregationImpl::reset() {
  const int64_t dim = options.dim, ways = num_ways(), weights = ways * options.sources;
  const auto norm = [&](const char* name) {
    return register_module(name,
                           Norm(dim, options.eps, NormKind::kRMSNorm, 1.0, tensor_options_, false));
  };
  if (options.prior) {
    prior = register_parameter("prior", at::empty({ways, options.sources}, tensor_options_));
  }
  if (options.connections.dynamic) {
    int64_t width = weights * options.expand;
    if (options.connections.round64) width = (width / 64 + 1) * 64;
    const double std = std::pow(static_cast<double>(dim), -0.5);
    w1 = register_module("w1", Linear(dim, width, false, std, tensor_options_, false));
    w2 = register_module("w2", Linear(width, weights, false, 0.0, tensor_options_, false));
    if (options.connections.pre_norm) generator_norm = norm("norm");
  }
  if (options.connections.pre_norm) pre_norm = norm("pre_norm");
  if (options.connections.post_norm != "none") {
    const auto* letters = std::get_if<std::string>(&options.ways);
    std::vector<int64_t> normed;
    for (int64_t way = 0; way < ways; ++way) {
      const bool residual =
          letters != nullptr ? (*letters)[static_cast<size_t>(way)] == 'r' : way == ways - 1;
      if (residual || options.connections.post_norm == "all") normed.push_back(way);
    }
    post_norms = register_module("post_norms", Norms(normed, dim, options.eps, NormKind::kRMSNorm,
                                                     1e-3, tensor_options_, false));
  }
}

void DepthAggregationImpl::reset_parameters() {
  const at::NoGradGuard no_grad;
  if (options.connections.dynamic) {
    w1->reset_parameters();
    w2->weight.zero_();
  }
  for (const Norm& norm : {generator_norm, pre_norm}) {
    if (norm) norm.ptr()->reset_parameters();
  }
  if (post_norms) post_norms->reset_parameters();
  if (options.prior) reset_prior(prior);
}

void DepthAggregationImpl::check_prior(const at::Tensor& tensor) const {
  TORCH_CHECK_TYPE(tensor.defined(), "prior must be a tensor, got an undefined one");
  TORCH_CHECK_VALUE(
      tensor.dim() == 2 && tensor.size(0) == num_ways() && tensor.size(1) == options.sources,
      "prior must have shape [", num_ways(), ", ", options.sources, "], got ", tensor.sizes());
}

void DepthAggregationImpl::reset_prior(at::Tensor tensor) const {
  check_prior(tensor);
  const at::NoGradGuard no_grad;
  tensor.zero_();
  if (options.connections.post_norm != "none") return;
  // The bounded weight, not the prior, has to be one; a cap of at most 1 cannot reach it.
  const double cap = options.connections.cap.value_or(0);
  tensor.select(1, options.sources - 1).fill_(cap > 1 ? cap * std::atanh(1 / cap) : 1.0);
}

namespace {

// Whether the operators take these norms: weights of one dtype, that of x or float32. Autocast sees
// to that itself.
bool takes_dtypes(const std::vector<Norm>& norms, const at::Tensor& x) {
  if (at::autocast::is_autocast_enabled(x.device().type())) return true;
  std::optional<at::ScalarType> dtype;
  for (const Norm& norm : norms) {
    if (!norm) continue;
    const at::ScalarType own = norm->weight.scalar_type();
    if ((own != x.scalar_type() && own != at::kFloat) || own != dtype.value_or(own)) return false;
    dtype = own;
  }
  return true;
}

// Nothing if the norms are of different kinds or of dtypes that the operators do not take.
std::optional<StreamNorms> stream_norms_of(const std::vector<Norm>& norms, const at::Tensor& x) {
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
  };
  if (!takes_dtypes(norms, x)) return std::nullopt;
  StreamNorms arguments;
  for (const Norm& norm : norms) {
    arguments.weights.push_back(norm ? optional(norm->weight) : std::nullopt);
    arguments.biases.push_back(norm ? optional(norm->bias) : std::nullopt);
    if (!norm) continue;
    const std::string_view kind = norm->kind() == NormKind::kRMSNorm ? "rms" : "layer";
    if (arguments.kind != "none" && (arguments.kind != kind || arguments.eps != norm->eps())) {
      return std::nullopt;
    }
    arguments.kind = kind;
    arguments.eps = norm->eps();
  }
  return arguments;
}

// Hidden states in the dtype that autocast, if it is on, gives them in every operator. To hand
// these on is to cast each hidden state once.
std::vector<at::Tensor> autocast_once(at::TensorList hiddens) {
  const at::DeviceType device = hiddens.back().device().type();
  if (!at::autocast::is_autocast_enabled(device)) return hiddens.vec();
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), hiddens, device);
}

}  // namespace

std::pair<std::vector<at::Tensor>, std::vector<at::Tensor>> DepthAggregationImpl::forward(
    at::TensorList hiddens, const at::Tensor& given_prior, const std::vector<Norm>& stream_norms,
    const Deferral& deferral) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(hiddens.size()) == options.sources, "hiddens must be ",
                    options.sources, " tensors, got ", hiddens.size());
  const at::Tensor& x = hiddens.back();
  TORCH_CHECK_TYPE(x.defined(), "hiddens[", options.sources - 1,
                   "] must be a tensor, got an undefined one");
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) == options.dim,
                    "hiddens must have shape [..., dim] with dim = ", options.dim, ", got ",
                    x.sizes());
  const at::Tensor& a = given_prior.defined() ? given_prior : prior;
  TORCH_CHECK_VALUE(a.defined(),
                    "prior must be given to a DepthAggregation that was made with prior = false");
  check_prior(a);
  const auto* letters = std::get_if<std::string>(&options.ways);
  const size_t count = letters != nullptr ? kWays.size() : static_cast<size_t>(num_ways());
  TORCH_CHECK_VALUE(stream_norms.empty() || stream_norms.size() == count, "stream_norms must have ",
                    count, " entries or none, got ", stream_norms.size());
  std::vector<Norm> norms(count, Norm(nullptr));
  std::copy(stream_norms.begin(), stream_norms.end(), norms.begin());
  std::vector<Norm> way_norms = norms;
  if (letters != nullptr) {
    way_norms.clear();
    for (const char way : *letters) way_norms.push_back(norms[kWays.find(way)]);
  }
  std::optional<Mixed> fused;
  if (x.is_cuda()) fused = mix_fused(hiddens, a, way_norms, deferral);
  Mixed mixed = fused ? *std::move(fused) : mix(hiddens, a, way_norms, deferral);
  if (letters == nullptr) return {std::move(mixed.streams), std::move(mixed.hiddens)};
  std::vector<at::Tensor> streams;
  for (size_t i = 0; i < count; ++i) {
    const size_t place = letters->find(kWays[i]);
    if (place != std::string::npos) {
      streams.push_back(mixed.streams[place]);
    } else {
      streams.push_back(norms[i] ? norms[i]->forward(mixed.newest) : mixed.newest);
    }
  }
  return {std::move(streams), std::move(mixed.hiddens)};
}

DepthAggregationImpl::Mixed DepthAggregationImpl::mix(at::TensorList hiddens, const at::Tensor& a,
                                                      const std::vector<Norm>& norms,
                                                      const Deferral& deferral) {
  auto [weights, newest] = connection_weights(hiddens.back(), a);
  TORCH_CHECK_TYPE(weights.defined() && newest.defined(),
                   "connection_weights() must return two tensors, got an undefined one");
  std::vector<at::Tensor> sources = hiddens.vec();
  sources.back() = pre_norm ? pre_norm->forward(newest) : newest;
  auto [mixed, handed_on] = depth_aggregate_chained(sources, weights, deferral);
  TORCH_CHECK_VALUE(mixed.size() == norms.size(),
                    "connection_weights() must return weights [..., C, S] with C = ", norms.size(),
                    ", got ", weights.sizes());
  if (!pre_norm) newest = handed_on.back();
  for (size_t way = 0; way < mixed.size(); ++way) {
    if (options.connections.post_norm != "none") {
      Norm norm = post_norms->at(static_cast<int64_t>(way));
      mixed[way] = newest + (norm ? norm->forward(mixed[way]) : mixed[way]);
    }
    Norm norm = norms[way];
    if (norm) mixed[way] = norm->forward(mixed[way]);
  }
  return {std::move(mixed), std::move(handed_on), std::move(newest)};
}

std::optional<DepthAggregationImpl::Mixed> DepthAggregationImpl::mix_fused(
    at::TensorList hiddens, const at::Tensor& a, const std::vector<Norm>& norms,
    const Deferral& deferral) {
  std::optional<StreamNorms> arguments = stream_norms_of(norms, hiddens.back());
  if (!arguments) return std::nullopt;
  const bool post = options.connections.post_norm != "none";
  if (!derived() && !at::GradMode::is_enabled() && !pre_norm && !post &&
      fuses_step(hiddens.back())) {
    const auto matrix = [&](const Linear& linear) {
      return options.connections.dynamic ? std::optional<at::Tensor>(linear->weight) : std::nullopt;
    };
    std::vector<at::Tensor> sources = autocast_once(hiddens);
    std::vector<at::Tensor> streams = depth_aggregation_step(
        sources, matrix(w1), matrix(w2), a,
        {std::nullopt, options.eps, options.connections.gelu_approximate, options.connections.cap},
        *arguments);
    at::Tensor newest = sources.back();
    return Mixed{std::move(streams), std::move(sources), std::move(newest)};
  }
  // Where no kernel makes the norms they are better left to the modules: the operator would make
  // them of several steps in float32.
  if (!fuses_norms(hiddens.back(), options.sources, num_ways())) return std::nullopt;
  // A norm after the sum must be the last way's, which then has no other norm.
  Norm post_norm{nullptr};
  for (size_t way = 0; post && way < norms.size(); ++way) {
    const Norm norm = post_norms->at(static_cast<int64_t>(way));
    if (!norm) continue;
    if (way + 1 != norms.size() || norms[way]) return std::nullopt;
    post_norm = norm;
  }
  const bool normed = arguments->kind != "none";
  if (!normed && !post && !pre_norm) return std::nullopt;
  if (!normed) arguments->eps = options.eps;
  std::vector<Norm> all = norms;
  for (const Norm& own : {pre_norm, post_norm}) {
    if (own && own->eps() != arguments->eps) return std::nullopt;
    all.push_back(own);
  }
  if (!takes_dtypes(all, hiddens.back())) return std::nullopt;
  auto [weights, newest] = connection_weights(hiddens.back(), a);
  std::vector<at::Tensor> sources = hiddens.vec();
  sources.back() = newest;
  const auto weight_of = [](const Norm& norm) {
    return norm ? std::optional<at::Tensor>(norm->weight) : std::nullopt;
  };
  arguments->add_newest = post;
  arguments->pre_weight = weight_of(pre_norm);
  arguments->post_weight = weight_of(post_norm);
  auto [streams, handed_on] = depth_aggregate_norm_chained(sources, weights, *arguments, deferral);
  if (!pre_norm) newest = handed_on.back();
  return Mixed{std::move(streams), std::move(handed_on), std::move(newest)};
}

bool DepthAggregationImpl::derived() const {
  return typeid(*this) != typeid(DepthAggregationImpl);
}

std::shared_ptr<torch::nn::Module> DepthAggregationImpl::clone(
    const std::optional<at::Device>& device) const {
  TORCH_CHECK(!derived(),
              "a class that derives from DepthAggregation must override clone(), which would "
              "otherwise lose what the class adds");
  return Cloneable::clone(device);
}

std::tuple<at::Tensor, at::Tensor> DepthAggregationImpl::connection_weights(const at::Tensor& x,
                                                                            const at::Tensor& a) {
  if (options.connections.dynamic) {
    const auto scale = generator_norm ? std::optional(generator_norm->weight) : std::nullopt;
    return connection_weights_chained(
        x, w1->weight, w2->weight, a,
        {scale, options.eps, options.connections.gelu_approximate, options.connections.cap});
  }
  detail::check_cap(options.connections.cap, a.scalar_type());
  const at::Tensor bounded = options.connections.cap
                                 ? at::tanh(a / *options.connections.cap) * *options.connections.cap
                                 : a;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.insert(shape.end(), a.sizes().begin(), a.sizes().end());
  return {bounded.to(x.scalar_type()).expand(shape), x};
}

void DepthAggregationImpl::pretty_print(std::ostream& stream) const {
  stream << "muddformer::DepthAggregation(" << options.dim << ", sources=" << options.sources
         << ", ways=";
  std::visit([&](const auto& ways) { stream << ways; }, options.ways);
  stream << ", dynamic=" << (options.connections.dynamic ? "true" : "false")
         << ", eps=" << options.eps;
  if (options.connections.dynamic)
    stream << ", gelu_approximate=" << options.connections.gelu_approximate;
  if (options.connections.cap) stream << ", cap=" << *options.connections.cap;
  stream << ')';
}

}  // namespace muddformer
