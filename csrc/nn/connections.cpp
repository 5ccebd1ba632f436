#include "connections.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <variant>

#include "checks.h"
#include "operators.h"

namespace muddformer {

PriorsImpl::PriorsImpl(std::vector<std::vector<int64_t>> shapes, at::TensorOptions options)
    : shapes_(std::move(shapes)), options_(options) {
  reset();
}

void PriorsImpl::reset() {
  for (size_t n = 0; n < shapes_.size(); ++n) {
    register_parameter(std::to_string(n), at::empty(shapes_[n], options_));
  }
}

void PriorsImpl::pretty_print(std::ostream& stream) const {
  stream << "muddformer::Priors(";
  for (size_t n = 0; n < shapes_.size(); ++n) {
    stream << (n == 0 ? "" : ", ") << at::IntArrayRef(shapes_[n]);
  }
  stream << ')';
}

Connections::Connections(int64_t dim, int64_t layers, const ConnectionOptions& given, double eps,
                         at::TensorOptions tensor_options, MakeAggregation make_aggregation)
    : options(given.checked()),
      dim_(dim),
      layers_(layers),
      eps_(eps),
      tensor_options_(tensor_options),
      make_aggregation_(std::move(make_aggregation)) {
  check_integer("dim", dim_);
  constexpr int64_t kMostLayers = (int64_t{1} << 16) - 1;  // whose outputs and X_0 are 2^16 sources
  check_integer("layers", layers_, kMostLayers, 0);
  check_real("eps", eps_, 0.0, 1.0);
  check_dtype("tensor_options", tensor_options_);
  joins_.assign(static_cast<size_t>(layers_) + 1, false);
  if (!options.dense) return;
  const bool last = options.ways.find('r') != std::string::npos;
  plan =
      aggregation_plan(layers, options.source_stride, options.block_stride, options.window, last);
  std::map<int64_t, int64_t> ways;
  for (const auto& [i, sources] : plan) {
    ways[i] = i == layers_ || !options.multiway ? 1 : static_cast<int64_t>(options.ways.size());
  }
  for (const std::vector<int64_t>& layers_of_group :
       flush_groups(plan, ways, options.flush_interval)) {
    FlushGroup& group = flush_groups_[layers_of_group.front()];
    group.layers = layers_of_group;
    for (const int64_t i : layers_of_group) {
      group.ways.push_back(ways[i]);
      group.sources.push_back(static_cast<int64_t>(plan[i].size()));
    }
  }
}

bool Connections::defers(at::TensorList older) const {
  if (older.empty() || !at::GradMode::is_enabled()) return false;
  const at::DeviceType device = older[0].device().type();
  const bool cast = options.residual_dtype != "float32" && autocasts(device) &&
                    older[0].scalar_type() != at::kDouble;
  const at::ScalarType dtype =
      cast ? at::autocast::get_autocast_dtype(device) : older[0].scalar_type();
  const bool fast = older[0].is_cuda() && (dtype == at::kBFloat16 || dtype == at::kHalf) &&
                    older[0].size(-1) % 8 == 0;
  return fast || options.flush_interval.has_value();
}

void Connections::reset(torch::nn::Module& owner) {
  using Ways = std::variant<std::string, int64_t>;
  torch::nn::ModuleList aggregations;
  std::vector<std::vector<int64_t>> shapes;
  std::set<int64_t> joining;
  for (const auto& [i, sources] : plan) {
    const bool single = i == layers_ || !options.multiway;
    const DepthAggregationOptions o{.dim = dim_,
                                    .sources = static_cast<int64_t>(sources.size()),
                                    .ways = single ? Ways(int64_t{1}) : Ways(options.ways),
                                    .expand = i == layers_ && options.expand_last ? 4 : 1,
                                    .prior = false,
                                    .eps = eps_,
                                    .connections = options};
    const auto da = make_aggregation_ ? make_aggregation_(o, tensor_options_)
                                      : std::make_shared<DepthAggregationImpl>(
                                            o, tensor_options_, /*initialize=*/false);
    TORCH_CHECK_VALUE(da != nullptr && da->options == o,
                      "make_aggregation must return a layer with the options that it is given");
    aggregations->push_back(da);
    shapes.push_back({da->num_ways(), o.sources});
    joining.insert(sources.begin(), sources.end());
  }
  // Hidden states that are mixed later but are not the newest of any aggregation, which would norm
  // them itself.
  for (const auto& [i, sources] : plan) joining.erase(i);
  for (const int64_t j : joining) joins_[static_cast<size_t>(j)] = true;

  dense_bs = owner.register_module("dense_bs", Priors(shapes, tensor_options_));
  dynamic_dense = owner.register_module("dynamic_dense", aggregations);
  std::vector<int64_t> normed;
  if (options.pre_norm) normed.assign(joining.begin(), joining.end());
  source_norms = owner.register_module(
      "source_norms",
      Norms(normed, dim_, eps_, NormKind::kRMSNorm, 1.0, tensor_options_, /*initialize=*/false));
}

void Connections::check_reset(const char* call) const {
  TORCH_CHECK(!dense_bs.is_empty(), call, "() came before reset(), which makes the parts");
}

void Connections::reset_parameters() {
  check_reset("reset_parameters");
  for (size_t n = 0; n < dynamic_dense->size(); ++n) {
    const auto da = dynamic_dense->ptr<DepthAggregationImpl>(n);
    da->reset_parameters();
    da->reset_prior((*dense_bs)[n]);
  }
  source_norms->reset_parameters();
}

std::vector<at::Tensor> Connections::parameters() const {
  check_reset("parameters");
  std::vector<at::Tensor> all;
  for (const torch::nn::Module* module :
       {static_cast<const torch::nn::Module*>(dense_bs.get()),
        static_cast<const torch::nn::Module*>(dynamic_dense.get()),
        static_cast<const torch::nn::Module*>(source_norms.get())}) {
    const std::vector<at::Tensor> some = module->parameters();
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

History Connections::begin(const at::Tensor& x0) const {
  check_reset("begin");
  TORCH_CHECK_TYPE(x0.defined(), "x must be a tensor, got an undefined one");
  TORCH_CHECK_VALUE(plan.empty() || (x0.dim() >= 1 && x0.size(-1) == dim_),
                    "x must have shape [..., dim] with dim = ", dim_, ", got ", x0.sizes());
  return {*this, x0};
}

namespace {

// How often each tensor was changed in place; not known of tensors of inference mode.
std::vector<int64_t> versions(at::TensorList tensors) {
  std::vector<int64_t> all;
  for (const at::Tensor& x : tensors) {
    all.push_back(x.is_inference() ? -1 : static_cast<int64_t>(x._version()));
  }
  return all;
}

}  // namespace

History::History(const Connections& connections, const at::Tensor& x0)
    : connections_(&connections), hiddens_(connections.joins_.size()) {
  join(x0);
}

// Makes X_count the newest hidden state, and adds it to the history if any aggregation reads it
// without being the one that follows.
void History::join(at::Tensor x) {
  const Connections& c = *connections_;
  const std::optional<std::string>& kept = c.options.residual_dtype;
  const at::DeviceType device = x.device().type();
  if (kept && autocasts(device) && x.scalar_type() != at::kDouble) {
    if (*kept == "autocast") {
      x = x.to(at::autocast::get_autocast_dtype(device));
    } else if (!c.plan.empty()) {
      x = x.to((*c.dense_bs)[0].scalar_type());
    }
  }
  if (c.joins_[static_cast<size_t>(count_)]) {
    Norm norm = c.source_norms->at(count_);
    hiddens_[static_cast<size_t>(count_)] = norm ? norm->forward(x) : x;
  }
  newest_ = std::move(x);
}

void History::check_open(const char* call) const {
  TORCH_CHECK(!ended_, call, "() came after result(), with which a history ends: begin a new one");
}

std::vector<at::Tensor> History::streams(const std::vector<Norm>& norms) {
  const Connections& c = *connections_;
  check_open("streams");
  TORCH_CHECK(given_.empty(), "streams were made already for block ", count_,
              "; append its output first");
  TORCH_CHECK(count_ < c.layers_, "streams() came after the output of the last of the ", c.layers_,
              " blocks; what follows is result()");
  TORCH_CHECK_VALUE(norms.empty() || norms.size() == kWays.size(),
                    "norms must be those of xq, xk, xv and xr or none, got ", norms.size());
  const bool multiway = c.options.multiway;
  std::vector<at::Tensor> streams;
  if (multiway && c.plan.contains(count_)) {
    streams = aggregate(norms);
  } else {
    const at::Tensor made = c.plan.contains(count_) ? aggregate({})[0] : newest_;
    if (norms.empty()) {
      streams.assign(multiway ? kWays.size() : 1, made);
    } else {
      streams = normed(made, norms);
    }
  }
  given_ = streams;
  given_.push_back(std::move(newest_));
  versions_ = versions(given_);
  return streams;
}

void History::append(at::Tensor x) {
  check_open("append");
  TORCH_CHECK(count_ < connections_->layers_, "append() came after the output of the last of the ",
              connections_->layers_, " blocks; what follows is result()");
  TORCH_CHECK(!given_.empty(), "append() came before streams() of block ", count_,
              ", which are what its output is made of");
  TORCH_CHECK_TYPE(x.defined(), "block ", count_, " must return a tensor, got an undefined one");
  TORCH_CHECK_VALUE(x.sizes() == given_[0].sizes(), "block ", count_,
                    " must return the shape of its input ", given_[0].sizes(), ", got ", x.sizes());
  TORCH_CHECK(versions(given_) == versions_, "block ", count_,
              " changes its input in place, but later blocks read this hidden state too: "
              "write x = x + f(x) instead of x += f(x)");
  given_.clear();
  ++count_;
  join(std::move(x));
}

at::Tensor History::result() {
  check_open("result");
  TORCH_CHECK(count_ == connections_->layers_ && given_.empty(),
              "result() came before the output of block ", count_, " of ", connections_->layers_,
              " was appended");
  at::Tensor y = connections_->plan.contains(count_) ? aggregate({})[0] : newest_;
  ended_ = true;
  newest_.reset();
  return y;
}

std::vector<at::Tensor> History::aggregate(const std::vector<Norm>& norms) {
  const Connections& c = *connections_;
  const at::DeviceType device = newest_.device().type();
  c10::DispatchKeySet excluded;
  if (c.options.residual_dtype == "float32" && autocasts(device)) {
    excluded = excluded.add(at::autocast::get_autocast_dispatch_key_from_device_type(device));
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(excluded);

  const auto found = c.plan.find(count_);
  const auto n = static_cast<size_t>(std::distance(c.plan.begin(), found));
  const std::vector<int64_t>& numbers = found->second;
  std::vector<at::Tensor> sources;
  for (const int64_t j : numbers) sources.push_back(hiddens_[static_cast<size_t>(j)]);
  sources.pop_back();
  const auto group = c.flush_groups_.find(count_);
  if (group != c.flush_groups_.end() && c.defers(sources)) {
    const auto& [layers, ways, counts] = group->second;
    auto [older, opened] = defer_gradients(sources, ways, counts);
    sources = std::move(older);
    for (size_t k = 0; k < layers.size(); ++k) deferrals_[layers[k]] = std::move(opened[k]);
  }
  sources.push_back(newest_);
  auto [mixed, handed_on] = c.dynamic_dense->ptr<DepthAggregationImpl>(n)->forward(
      sources, (*c.dense_bs)[n], norms, deferrals_[count_]);
  deferrals_.erase(count_);
  std::fill(hiddens_.begin(), hiddens_.end(), at::Tensor());
  for (size_t s = 0; s < numbers.size(); ++s) {
    hiddens_[static_cast<size_t>(numbers[s])] = std::move(handed_on[s]);
  }
  return std::move(mixed);
}

}  // namespace muddformer
