// The aggregation with normed streams on CUDA: host side of csrc/kernels/depth_aggregate_norm, and the
// composition for what these kernels cannot do.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/depth_aggregate_norm/depth_aggregate_norm.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer {
namespace {

// The norms' parameters as the launches take them, and what keeps them alive.
class Norms {
 public:
  Norms(const OptionalTensors& weights, const OptionalTensors& biases,
        const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight) {
    for (size_t c = 0; c < weights.size(); ++c) {
      weight_pointers_.push_back(keep(weights.get(c)));
      bias_pointers_.push_back(keep(biases.get(c)));
    }
    pre_pointer_ = keep(pre_weight);
    post_pointer_ = keep(post_weight);
  }
  template <typename Args>
  void set(Args& args, std::string_view norm, bool add_newest, const at::Tensor& mix,
           const at::Tensor& statistics) const {
    args.norm = norm == "layer" ? kernels::Norm::Layer : kernels::Norm::RMS;
    args.wide = !kept_.empty() && kept_[0].scalar_type() == at::kFloat;
    args.norm_weight = weight_pointers_.data();
    args.norm_bias = bias_pointers_.data();
    args.add_newest = add_newest;
    args.pre_weight = pre_pointer_;
    args.post_weight = post_pointer_;
    args.mix = mix.numel() != 0 ? mix.data_ptr() : nullptr;
    args.statistics = statistics.data_ptr<float>();
  }

 private:
  const void* keep(const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value() || !tensor->defined()) return nullptr;
    kept_.push_back(tensor->contiguous());
    return kept_.back().const_data_ptr();
  }

  std::vector<at::Tensor> kept_;
  std::vector<const void*> weight_pointers_, bias_pointers_;
  const void* pre_pointer_ = nullptr;
  const void* post_pointer_ = nullptr;
};

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor, at::Tensor>
depth_aggregate_norm_forward_cuda(at::TensorList hiddens, const at::Tensor& weights,
                                  const OptionalTensors& norm_weights,
                                  const OptionalTensors& norm_biases, std::string_view norm,
                                  double eps, bool add_newest,
                                  const std::optional<at::Tensor>& pre_weight,
                                  const std::optional<at::Tensor>& post_weight) {
  check_depth_aggregate_norm(hiddens, weights, norm_weights, norm_biases, norm, eps, add_newest,
                             pre_weight, post_weight);
  const at::Tensor& like = hiddens[0];
  const c10::cuda::CUDAGuard device_guard(like.device());
  if (like.scalar_type() != at::kDouble && like.numel() != 0) {
    const int64_t ways = weights.size(-2), tokens = like.numel() / like.size(-1);
    std::vector<at::Tensor> outputs = empty_outputs(ways, like);
    const auto row_for = [&](const std::optional<at::Tensor>& weight) {
      return at::empty(weight.has_value() ? like.sizes() : at::IntArrayRef{0}, like.options());
    };
    at::Tensor newest = row_for(pre_weight), mix = row_for(post_weight);
    at::Tensor statistics = at::empty({2, ways + (pre_weight.has_value() ? 1 : 0), tokens},
                                      like.options().dtype(at::kFloat));
    const Rows x = rows_of(hiddens), y = rows_of(outputs);
    const at::Tensor w = token_blocks(weights, tokens);
    const Norms norms(norm_weights, norm_biases, pre_weight, post_weight);
    kernels::AggregateNormForward args{};
    set_inputs(args, x, like, w);
    norms.set(args, norm, add_newest, mix, statistics);
    args.normed = pre_weight.has_value() ? newest.data_ptr() : nullptr;
    args.eps = static_cast<float>(eps);
    args.y = y.pointers();
    const cudaError_t error =
        kernels::launch_aggregate_norm_forward(args, c10::cuda::getCurrentCUDAStream());
    if (error != cudaErrorNotSupported) {
      C10_CUDA_CHECK(error);
      return {std::move(outputs), std::move(newest), std::move(mix), std::move(statistics)};
    }
  }
  return depth_aggregate_norm_forward_composition(hiddens, weights, norm_weights, norm_biases, norm,
                                                  eps, add_newest, pre_weight, post_weight);
}

std::tuple<std::vector<at::Tensor>, at::Tensor, std::vector<at::Tensor>, std::vector<at::Tensor>,
           at::Tensor, at::Tensor, std::vector<at::Tensor>>
depth_aggregate_norm_backward_cuda(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, const OptionalTensors& norm_weights,
    const OptionalTensors& norm_biases, std::string_view norm, double eps, bool add_newest,
    const std::optional<at::Tensor>& pre_weight, const std::optional<at::Tensor>& post_weight,
    at::TensorList outputs, const at::Tensor& mix, const at::Tensor& statistics, int64_t deferred) {
  check_depth_aggregate_norm_backward(grad_outputs, grad_hiddens, hiddens, weights, norm_weights,
                                      norm_biases, norm, eps, add_newest, pre_weight, post_weight,
                                      outputs, mix, statistics, deferred);
  const at::Tensor& like = hiddens[0];
  const c10::cuda::CUDAGuard device_guard(like.device());
  if (like.scalar_type() != at::kDouble && like.numel() != 0) {
    const int64_t sources = weights.size(-1), ways = weights.size(-2);
    const int64_t tokens = like.numel() / like.size(-1);
    const auto empty_like = [](const at::Tensor& tensor) {
      return at::empty(tensor.sizes(), tensor.options());
    };
    const auto none = [&] { return at::empty({0}, like.options()); };  // outputs share no memory
    const auto empty_like_each = [&](const OptionalTensors& tensors, std::vector<void*>& pointers) {
      std::vector<at::Tensor> result;
      for (size_t i = 0; i < tensors.size(); ++i) {
        const at::Tensor tensor = value_or_undefined(tensors, static_cast<int64_t>(i));
        result.push_back(tensor.defined() ? empty_like(tensor) : none());
        pointers.push_back(tensor.defined() ? result.back().data_ptr() : nullptr);
      }
      return result;
    };
    std::vector<at::Tensor> grads = empty_outputs(sources - deferred, like);
    at::Tensor grad_weights = empty_like(weights);
    std::vector<void*> weight_grads, bias_grads;
    std::vector<at::Tensor> grad_norm_weights = empty_like_each(norm_weights, weight_grads);
    std::vector<at::Tensor> grad_norm_biases = empty_like_each(norm_biases, bias_grads);
    at::Tensor grad_pre_weight = pre_weight.has_value() ? empty_like(*pre_weight) : none();
    at::Tensor grad_post_weight = post_weight.has_value() ? empty_like(*post_weight) : none();
    std::vector<at::Tensor> grad_sums;  // for the flush of the deferred gradients
    std::vector<void*> sum_grads;
    for (int64_t c = 0; c < ways; ++c) {
      const bool normed = has_norm(norm_weights, post_weight, c);
      grad_sums.push_back(deferred > 0 && normed ? empty_like(like) : none());
      sum_grads.push_back(deferred > 0 && normed ? grad_sums.back().data_ptr() : nullptr);
    }

    const Rows x = rows_of(hiddens), dx = rows_of(grads, deferred);
    const Rows y = contiguous_rows_of(optional_tensors(outputs), ways);
    const Rows dy = contiguous_rows_of(grad_outputs, ways);
    const at::Tensor kept_mix = mix.contiguous(), kept_statistics = statistics.contiguous();
    const Rows incoming = contiguous_rows_of(grad_hiddens, sources);
    const at::Tensor w = token_blocks(weights, tokens);
    const Norms norms(norm_weights, norm_biases, pre_weight, post_weight);
    kernels::AggregateNormBackward args{};
    set_inputs(args, x, like, w);
    norms.set(args, norm, add_newest, kept_mix, kept_statistics);
    args.dy = dy.pointers();
    args.y = y.pointers();
    args.grad_in = incoming.pointers();
    args.grad_out = dx.pointers();
    args.dw = grad_weights.data_ptr();
    args.dv = sum_grads.data();
    args.norm_weight_grad = weight_grads.data();
    args.norm_bias_grad = bias_grads.data();
    args.pre_weight_grad = pre_weight.has_value() ? grad_pre_weight.data_ptr() : nullptr;
    args.post_weight_grad = post_weight.has_value() ? grad_post_weight.data_ptr() : nullptr;
    int64_t floats = 0;
    cudaError_t error = kernels::aggregate_norm_workspace(args, &floats);
    if (error == cudaSuccess) {
      const at::Tensor workspace = at::empty({floats}, like.options().dtype(at::kFloat));
      args.workspace = workspace.data_ptr<float>();
      error = kernels::launch_aggregate_norm_backward(args, c10::cuda::getCurrentCUDAStream());
    }
    if (error != cudaErrorNotSupported) {
      C10_CUDA_CHECK(error);
      return {std::move(grads),
              std::move(grad_weights),
              std::move(grad_norm_weights),
              std::move(grad_norm_biases),
              std::move(grad_pre_weight),
              std::move(grad_post_weight),
              std::move(grad_sums)};
    }
  }
  return depth_aggregate_norm_backward_composition(grad_outputs, grad_hiddens, hiddens, weights,
                                                   norm_weights, norm_biases, norm, eps, add_newest,
                                                   pre_weight, post_weight, statistics, deferred);
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("depth_aggregate_norm_forward", depth_aggregate_norm_forward_cuda);
  m.impl("depth_aggregate_norm_backward", depth_aggregate_norm_backward_cuda);
}

}  // namespace muddformer
