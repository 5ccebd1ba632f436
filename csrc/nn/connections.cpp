#include "connections.h"

#include <ATen/autocast_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <set>
#include <utility>

#include "checks.h"

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

Connections::Connections(const ConnectionOptions& given, int64_t dim, int64_t layers, double eps,
                         at::TensorOptions tensor_options)
    : options(given.checked()),
      dim_(dim),
      layers_(layers),
      eps_(eps),
      tensor_options_(tensor_options) {
  check_integer("dim", dim_);
  check_real("eps", eps_, 0.0, 1.0);
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
  const at::ScalarType dtype = at::autocast::is_autocast_enabled(older[0].device().type())
                                   ? at::autocast::get_autocast_dtype(older[0].device().type())
                                   : older[0].scalar_type();
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
    const DepthAggregation da(o, tensor_options_, /*initialize=*/false);
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

void Connections::reset_parameters() {
  for (size_t n = 0; n < dynamic_dense->size(); ++n) {
    const auto da = dynamic_dense->ptr<DepthAggregationImpl>(n);
    da->reset_parameters();
    da->reset_prior((*dense_bs)[n]);
  }
  source_norms->reset_parameters();
}

std::vector<at::Tensor> Connections::parameters() const {
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

at::Tensor Connections::run(const at::Tensor& x0,
                            c10::function_ref<at::Tensor(int64_t, at::TensorList, bool)> block,
                            c10::function_ref<std::vector<Norm>(int64_t)> stream_norms) const {
  TORCH_CHECK_VALUE(plan.empty() || (x0.dim() >= 1 && x0.size(-1) == dim_),
                    "x must have shape [..., dim] with dim = ", dim_, ", got ", x0.sizes());
  std::vector<at::Tensor> history(joins_.size()), streams = {x0};
  std::map<int64_t, Deferral> deferrals;
  bool normed = false;
  // Adds X_i to the history if any aggregation reads it.
  const auto join = [&](size_t i, const at::Tensor& x) {
    if (!joins_[i]) return;
    Norm norm = source_norms->at(static_cast<int64_t>(i));
    history[i] = norm ? norm->forward(x) : x;
  };
  join(0, x0);
  auto aggregation = plan.begin();
  for (int64_t i = 1; i <= layers_; ++i) {
    if (options.multiway && streams.size() == 1) streams.resize(kWays.size(), streams[0]);
    const std::vector<int64_t> before = versions(streams);
    at::Tensor x = block(i - 1, streams, normed);
    TORCH_CHECK_TYPE(x.defined(), "block ", i - 1, " must return a tensor, got an undefined one");
    TORCH_CHECK_VALUE(x.sizes() == streams[0].sizes(), "block ", i - 1,
                      " must return the shape of its input ", streams[0].sizes(), ", got ",
                      x.sizes());
    TORCH_CHECK(versions(streams) == before, "block ", i - 1,
                " changes its input in place, but later blocks read this hidden state too: "
                "write x = x + f(x) instead of x += f(x)");
    if (aggregation == plan.end() || aggregation->first != i) {
      join(static_cast<size_t>(i), x);
      streams = {std::move(x)};
      normed = false;
      continue;
    }
    const auto n = static_cast<size_t>(std::distance(plan.begin(), aggregation));
    const std::vector<int64_t>& numbers = (aggregation++)->second;
    std::vector<at::Tensor> sources;
    for (const int64_t j : numbers) sources.push_back(history[static_cast<size_t>(j)]);
    sources.pop_back();
    if (const auto group = flush_groups_.find(i); group != flush_groups_.end() && defers(sources)) {
      const auto& [layers, ways, counts] = group->second;
      auto [older, opened] = defer_gradients(sources, ways, counts);
      sources = std::move(older);
      for (size_t k = 0; k < layers.size(); ++k) deferrals[layers[k]] = std::move(opened[k]);
    }
    sources.push_back(std::move(x));
    std::vector<Norm> norms;
    if (options.multiway && i < layers_) norms = stream_norms(i);
    normed = !norms.empty();
    auto [mixed, handed_on] = dynamic_dense->ptr<DepthAggregationImpl>(n)->forward(
        sources, (*dense_bs)[n], norms, deferrals[i]);
    deferrals.erase(i);
    streams = std::move(mixed);
    std::fill(history.begin(), history.end(), at::Tensor());
    for (size_t s = 0; s < numbers.size(); ++s) {
      history[static_cast<size_t>(numbers[s])] = std::move(handed_on[s]);
    }
  }
  return streams.back();
}

}  // namespace muddformer
