// The decoding form of a layer on CUDA: host side of csrc/kernels/depth_aggregation_step.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "../../kernels/depth_aggregation_step/depth_aggregation_step.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

// The prior, the scale and the norms' parameters, contiguous and all of one dtype.
class Parameters {
 public:
  explicit Parameters(at::ScalarType dtype) : dtype_(dtype) {}

  const void* add(const std::optional<at::Tensor>& tensor) {
    if (!tensor.has_value()) return nullptr;
    tensors_.push_back(tensor->to(dtype_).contiguous());
    return tensors_.back().const_data_ptr();
  }

 private:
  at::ScalarType dtype_;
  std::vector<at::Tensor> tensors_;
};

std::vector<at::Tensor> depth_aggregation_step_cuda(at::TensorList hiddens,
                                                    const std::optional<at::Tensor>& w1,
                                                    const std::optional<at::Tensor>& w2,
                                                    const at::Tensor& prior,
                                                    const GeneratorOptions& options,
                                                    const StepNorms& norms) {
  check_depth_aggregation_step(hiddens, w1, w2, prior, options, norms);
  const at::Tensor& like = hiddens.back();
  const int64_t ways = prior.size(0), width = like.size(-1), tokens = like.numel() / width;
  const auto compose = [&] {
    return depth_aggregation_step_composition(hiddens, w1, w2, prior, options, norms);
  };
  // What the launcher would refuse, before work is done for it.
  if (like.scalar_type() == at::kDouble || tokens > kernels::kMaxStepTokens ||
      hiddens.size() > kernels::kMaxStepSources || ways > kernels::kMaxStepWays) {
    return compose();
  }
  const c10::cuda::CUDAGuard device_guard(like.device());
  std::vector<at::Tensor> outputs = empty_outputs(ways, like);
  if (tokens == 0) return outputs;
  const Rows x = rows_of(hiddens), y = rows_of(outputs);
  const at::Tensor first = w1.has_value() ? w1->contiguous() : at::Tensor();
  const at::Tensor second = w2.has_value() ? w2->contiguous() : at::Tensor();

  const auto is_wide = [](const std::optional<at::Tensor>& tensor) {
    return tensor.has_value() && tensor->scalar_type() == at::kFloat;
  };
  const bool wide = is_wide(prior) || is_wide(options.scale) ||
                    std::any_of(norms.weights.begin(), norms.weights.end(), is_wide) ||
                    std::any_of(norms.biases.begin(), norms.biases.end(), is_wide);
  Parameters parameters(wide ? at::kFloat : like.scalar_type());
  std::vector<const void*> weight_pointers(ways), bias_pointers(ways);
  for (int64_t c = 0; c < ways; ++c) {
    weight_pointers[c] = parameters.add(entry(norms.weights, c));
    bias_pointers[c] = parameters.add(entry(norms.biases, c));
  }
  kernels::AggregationStep args{};
  args.dtype = kernel_dtype(like.scalar_type());
  args.tokens = tokens;
  args.dim = width;
  args.sources = static_cast<int>(hiddens.size());
  args.ways = static_cast<int>(ways);
  args.hidden = first.defined() ? static_cast<int>(first.size(0)) : 0;
  args.x = x.pointers();
  args.x_stride = x.strides();
  args.w1 = first.defined() ? first.const_data_ptr() : nullptr;
  args.w2 = second.defined() ? second.const_data_ptr() : nullptr;
  args.wide = wide;
  args.prior = parameters.add(prior);
  args.scale = parameters.add(options.scale);
  args.eps = static_cast<float>(options.eps);
  args.gelu_tanh = options.gelu_approximate == "tanh";
  args.cap = static_cast<float>(options.cap.value_or(0.0));
  args.layer_norm = norms.kind == "layer";
  args.norm_eps = static_cast<float>(norms.eps);
  args.norm_weight = weight_pointers.data();
  args.norm_bias = bias_pointers.data();
  args.y = y.pointers();
  const cudaError_t error =
      kernels::launch_aggregation_step(args, c10::cuda::getCurrentCUDAStream());
  if (error == cudaErrorNotSupported) return compose();
  C10_CUDA_CHECK(error);
  return outputs;
}

}  // namespace

int64_t step_tokens_by_cuda(const at::Tensor& newest) {
  return ask_device(newest, kernels::aggregation_step_tokens);
}

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("depth_aggregation_step", flat<depth_aggregation_step_cuda>);
}

}  // namespace muddformer::detail
