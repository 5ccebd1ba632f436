// The aggregation with normed streams on CUDA: host side of csrc/kernels/depth_aggregate_norm, and
// the composition for what these kernels cannot do.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <climits>

#include "../../kernels/depth_aggregate_norm/depth_aggregate_norm.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

// Of what is there: [0] stands for nothing.
void* pointer_of(const at::Tensor& tensor) {
  return tensor.numel() != 0 ? tensor.data_ptr() : nullptr;
}

std::vector<void*> pointers_of(const std::vector<at::Tensor>& tensors) {
  std::vector<void*> pointers;
  for (const at::Tensor& tensor : tensors) pointers.push_back(pointer_of(tensor));
  return pointers;
}

// The norms' parameters as the launches take them, and what keeps them alive.
class NormPointers {
 public:
  explicit NormPointers(const StreamNorms& norms) {
    for (size_t c = 0; c < norms.weights.size(); ++c) {
      weight_pointers_.push_back(keep(norms.weights.get(c)));
      bias_pointers_.push_back(keep(norms.biases.get(c)));
    }
    pre_pointer_ = keep(norms.pre_weight);
    post_pointer_ = keep(norms.post_weight);
  }
  template <typename Args>
  void set(Args& args, const StreamNorms& norms, const at::Tensor& mix,
           const at::Tensor& statistics) const {
    args.norm = norms.kind == "layer" ? kernels::Norm::Layer : kernels::Norm::RMS;
    args.wide = !kept_.empty() && kept_[0].scalar_type() == at::kFloat;
    args.norm_weight = weight_pointers_.data();
    args.norm_bias = bias_pointers_.data();
    args.add_newest = norms.add_newest;
    args.pre_weight = pre_pointer_;
    args.post_weight = post_pointer_;
    args.mix = pointer_of(mix);
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

NormedStreams depth_aggregate_norm_forward_cuda(at::TensorList hiddens, const at::Tensor& weights,
                                                const StreamNorms& norms) {
  check_depth_aggregate_norm(hiddens, weights, norms);
  const at::Tensor& like = hiddens[0];
  const c10::cuda::CUDAGuard device_guard(like.device());
  if (like.scalar_type() != at::kDouble && like.numel() != 0) {
    const int64_t ways = weights.size(-2), tokens = like.numel() / like.size(-1);
    std::vector<at::Tensor> outputs = empty_outputs(ways, like);
    const auto row_for = [&](const std::optional<at::Tensor>& weight) {
      return empty_cuda(weight.has_value() ? like.sizes() : at::IntArrayRef{0}, like.options());
    };
    at::Tensor newest = row_for(norms.pre_weight), mix = row_for(norms.post_weight);
    at::Tensor statistics = empty_cuda({2, ways + (norms.pre_weight.has_value() ? 1 : 0), tokens},
                                       like.options().dtype(at::kFloat));
    const Rows x = rows_of(hiddens), y = rows_of(outputs);
    const TokenBlocks w(weights, tokens);
    const NormPointers pointers(norms);
    kernels::AggregateNormForward args{};
    set_inputs(args, x, like, w);
    pointers.set(args, norms, mix, statistics);
    args.normed = pointer_of(newest);
    args.eps = static_cast<float>(norms.eps);
    args.y = y.pointers();
    const cudaError_t error =
        kernels::launch_aggregate_norm_forward(args, c10::cuda::getCurrentCUDAStream());
    if (error != cudaErrorNotSupported) {
      C10_CUDA_CHECK(error);
      return {std::move(outputs), std::move(newest), std::move(mix), std::move(statistics)};
    }
  }
  return depth_aggregate_norm_forward_composition(hiddens, weights, norms);
}

NormsGradients depth_aggregate_norm_backward_cuda(const OptionalTensors& grad_outputs,
                                                  const OptionalTensors& grad_hiddens,
                                                  at::TensorList hiddens, const at::Tensor& weights,
                                                  const StreamNorms& norms,
                                                  const NormsForward& forward, int64_t deferred) {
  check_depth_aggregate_norm_backward(grad_outputs, grad_hiddens, hiddens, weights, norms, forward,
                                      deferred);
  const at::Tensor& like = hiddens[0];
  const c10::cuda::CUDAGuard device_guard(like.device());
  if (like.scalar_type() != at::kDouble && like.numel() != 0) {
    const int64_t sources = weights.size(-1), ways = weights.size(-2);
    const int64_t tokens = like.numel() / like.size(-1);
    NormsGradients result = empty_gradients(
        hiddens, weights, norms, deferred, [](const at::Tensor& tensor, bool given) {
          return empty_cuda(given ? tensor.sizes() : at::IntArrayRef{0}, tensor.options());
        });
    auto& [grads, grad_weights, grad_norm_weights, grad_norm_biases, grad_pre_weight,
           grad_post_weight, grad_sums] = result;
    const std::vector<void*> weight_grads = pointers_of(grad_norm_weights);
    const std::vector<void*> bias_grads = pointers_of(grad_norm_biases);
    const std::vector<void*> sum_grads = pointers_of(grad_sums);
    const Rows x = rows_of(hiddens), dx = rows_of(grads, deferred);
    const Rows y = contiguous_rows_of(optional_tensors(forward.outputs), ways);
    const Rows dy = contiguous_rows_of(grad_outputs, ways);
    const at::Tensor mix = forward.mix.contiguous();
    const at::Tensor statistics = forward.statistics.contiguous();
    const Rows incoming = contiguous_rows_of(grad_hiddens, sources);
    const TokenBlocks w(weights, tokens);
    const NormPointers pointers(norms);
    kernels::AggregateNormBackward args{};
    set_inputs(args, x, like, w);
    pointers.set(args, norms, mix, statistics);
    args.dy = dy.pointers();
    args.y = y.pointers();
    args.grad_in = incoming.pointers();
    args.grad_out = dx.pointers();
    args.dw = grad_weights.data_ptr();
    args.dv = sum_grads.data();
    args.norm_weight_grad = weight_grads.data();
    args.norm_bias_grad = bias_grads.data();
    args.pre_weight_grad = pointer_of(grad_pre_weight);
    args.post_weight_grad = pointer_of(grad_post_weight);
    int64_t floats = 0;
    cudaError_t error = kernels::aggregate_norm_workspace(args, &floats);
    if (error == cudaSuccess) {
      const at::Tensor workspace = empty_cuda({floats}, like.options().dtype(at::kFloat));
      args.workspace = workspace.data_ptr<float>();
      error = kernels::launch_aggregate_norm_backward(args, c10::cuda::getCurrentCUDAStream());
    }
    if (error != cudaErrorNotSupported) {
      C10_CUDA_CHECK(error);
      return result;
    }
  }
  return depth_aggregate_norm_backward_composition(grad_outputs, grad_hiddens, hiddens, weights,
                                                   norms, forward.statistics, deferred);
}

}  // namespace

bool norms_fused_by_cuda(const at::Tensor& x, int64_t sources, int64_t ways) {
  const int64_t width = x.sym_size(-1).guard_int(__FILE__, __LINE__);
  constexpr int64_t kMost = INT_MAX;
  return width % 8 == 0 && ask_device(x, [&](kernels::DType dtype) {
           return kernels::aggregate_norm_supported(dtype, width,
                                                    static_cast<int>(std::min(sources, kMost)),
                                                    static_cast<int>(std::min(ways, kMost)));
         });
}

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("depth_aggregate_norm_forward", flat<depth_aggregate_norm_forward_cuda>);
  m.impl("depth_aggregate_norm_backward", flat<depth_aggregate_norm_backward_cuda>);
}

}  // namespace muddformer::detail
