// The connection weights on CUDA: host side of csrc/kernels/connection_weights. float32, float64
// and sizes that the kernels do not take go through the composition.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../../kernels/connection_weights/connection_weights.h"
#include "../common/launch_arguments.h"
#include "composition.h"

namespace muddformer::detail {
namespace {

// Contiguous, and aligned as the kernels need it.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor contiguous = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(contiguous.const_data_ptr()) % 16 == 0 ? contiguous
                                                                            : contiguous.clone();
}

// W1 with the norm's scale folded in.
at::Tensor scaled(const at::Tensor& w1, const std::optional<at::Tensor>& scale) {
  if (!scale.has_value()) return aligned(w1);
  at::Tensor product = empty_cuda(w1.sizes(), w1.options());
  at::mul_out(product, w1, *scale);
  return product;
}

// The shape, if the kernels take it on the current device.
std::optional<kernels::ConnectionWeightsShape> kernel_shape(const at::Tensor& x,
                                                            const at::Tensor& w1,
                                                            const at::Tensor& prior,
                                                            const GeneratorOptions& options) {
  const at::ScalarType dtype = x.scalar_type();
  if ((dtype != at::kBFloat16 && dtype != at::kHalf) || x.numel() == 0) return std::nullopt;
  if (w1.size(0) > kernels::kMaxHidden || prior.numel() > kernels::kMaxOutputs) return std::nullopt;
  const kernels::ConnectionWeightsShape shape{kernel_dtype(dtype),
                                              token_count(x),
                                              x.size(-1),
                                              static_cast<int>(w1.size(0)),
                                              static_cast<int>(prior.numel()),
                                              options.gelu_approximate == "tanh",
                                              static_cast<float>(options.cap.value_or(0))};
  if (!kernels::connection_weights_supported(shape)) return std::nullopt;
  return shape;
}

at::Tensor empty_of_tokens(const at::Tensor& x, at::IntArrayRef last, at::ScalarType dtype) {
  at::DimVector shape(x.sizes().begin(), x.sizes().end() - 1);
  shape.append(last.begin(), last.end());
  return empty_cuda(shape, x.options().dtype(dtype));
}

// (weights, hidden, factor); the last two only where they are kept for a backward.
WeightsAndKept forward(const kernels::ConnectionWeightsShape& shape, const at::Tensor& x,
                       const at::Tensor& w1, const at::Tensor& w2, const at::Tensor& prior,
                       const GeneratorOptions& options, bool keep) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::Tensor weights = empty_of_tokens(x, prior.sizes(), x.scalar_type());
  at::Tensor hidden, factor;
  if (keep) {
    hidden = empty_of_tokens(x, {w1.size(0)}, x.scalar_type());
    factor = empty_of_tokens(x, {}, at::kFloat);
  }
  const at::Tensor rows = aligned(x), first = scaled(w1, options.scale), second = aligned(w2);
  const at::Tensor bias = prior.contiguous();
  kernels::ConnectionWeightsForward args;
  args.shape = shape;
  args.eps = static_cast<float>(options.eps);
  args.x = rows.const_data_ptr();
  args.w1 = first.const_data_ptr();
  args.w2 = second.const_data_ptr();
  args.prior = bias.const_data_ptr();
  args.prior_float32 = prior.scalar_type() == at::kFloat;
  args.weights = weights.mutable_data_ptr();
  args.hidden = keep ? hidden.mutable_data_ptr() : nullptr;
  args.factor = keep ? factor.mutable_data_ptr<float>() : nullptr;
  C10_CUDA_CHECK(
      kernels::launch_connection_weights_forward(args, c10::cuda::getCurrentCUDAStream()));
  return {std::move(weights), std::move(hidden), std::move(factor)};
}

at::Tensor connection_weights_cuda(const at::Tensor& x, const at::Tensor& w1, const at::Tensor& w2,
                                   const at::Tensor& prior, const GeneratorOptions& options) {
  check_connection_weights(x, w1, w2, prior, options);
  const c10::cuda::CUDAGuard device_guard(x.device());
  const auto shape = kernel_shape(x, w1, prior, options);
  if (shape) return std::get<0>(forward(*shape, x, w1, w2, prior, options, /*keep=*/false));
  return connection_weights_composition(x, w1, w2, prior, options);
}

WeightsAndKept connection_weights_forward_cuda(const at::Tensor& x, const at::Tensor& w1,
                                               const at::Tensor& w2, const at::Tensor& prior,
                                               const GeneratorOptions& options) {
  check_connection_weights(x, w1, w2, prior, options);
  const c10::cuda::CUDAGuard device_guard(x.device());
  const auto shape = kernel_shape(x, w1, prior, options);
  if (shape) return forward(*shape, x, w1, w2, prior, options, /*keep=*/true);
  return connection_weights_forward_composition(x, w1, w2, prior, options);
}

at::Tensor sum_rows(const at::Tensor& partials, const at::Tensor& like) {
  at::Tensor sum = empty_cuda(like.sizes(), like.options());
  C10_CUDA_CHECK(kernels::launch_sum_rows(
      {kernel_dtype(like.scalar_type()), partials.size(0), partials.size(1),
       partials.const_data_ptr<float>(), sum.mutable_data_ptr()},
      c10::cuda::getCurrentCUDAStream()));
  return sum;
}

// e with its coefficients, and what dW2 (undefined where it is not wanted) and dprior are the sums
// of.
struct HiddenGradients {
  at::Tensor e, coefficient, w2_partials, prior_partials;
};

HiddenGradients backward_of_hidden(const kernels::ConnectionWeightsShape& shape,
                                   const at::Tensor& grad_weights, const at::Tensor& w2,
                                   const WeightsForward& forward, bool want_w2) {
  const auto& [options, weights, hidden, factor] = forward;
  const int64_t tokens = shape.tokens, outputs = shape.outputs;
  const bool capped = shape.cap > 0;
  const at::Tensor grad = grad_weights.contiguous(), second = aligned(w2), h = aligned(hidden);
  const at::Tensor r = factor.contiguous(), a = capped ? weights->contiguous() : at::Tensor();
  const auto wide = hidden.options().dtype(at::kFloat);
  int64_t groups = 0;
  C10_CUDA_CHECK(kernels::hidden_backward_groups(tokens, groups));
  HiddenGradients g;
  g.e = empty_cuda({tokens, shape.hidden}, hidden.options());
  g.coefficient = empty_cuda({kernels::hidden_slabs(shape.hidden), tokens}, wide);
  if (want_w2) g.w2_partials = empty_cuda({groups, outputs, shape.hidden}, wide);
  g.prior_partials = empty_cuda({groups, outputs}, wide);
  kernels::ConnectionWeightsHiddenBackward args;
  args.shape = shape;
  args.grad_weights = grad.const_data_ptr();
  args.weights = capped ? a.const_data_ptr() : nullptr;
  args.w2 = second.const_data_ptr();
  args.hidden = h.const_data_ptr();
  args.factor = r.const_data_ptr<float>();
  args.grad_hidden = g.e.mutable_data_ptr();
  args.coefficient = g.coefficient.mutable_data_ptr<float>();
  args.w2_partials = want_w2 ? g.w2_partials.mutable_data_ptr<float>() : nullptr;
  args.prior_partials = g.prior_partials.mutable_data_ptr<float>();
  C10_CUDA_CHECK(
      kernels::launch_connection_weights_hidden_backward(args, c10::cuda::getCurrentCUDAStream()));
  return g;
}

// dx (undefined where it is not wanted), and partials of e^T x (likewise).
std::pair<at::Tensor, at::Tensor> backward_of_input(
    const kernels::ConnectionWeightsShape& shape, const at::Tensor& x,
    const std::optional<at::Tensor>& grad_x, const at::Tensor& w1,
    const std::optional<at::Tensor>& scale, const HiddenGradients& g, bool want_x, bool want_w1) {
  int splits = 1;
  C10_CUDA_CHECK(kernels::input_backward_splits(shape, splits));
  const at::Tensor rows = aligned(x), first = scaled(w1, scale);
  const at::Tensor incoming = grad_x.has_value() && want_x ? aligned(*grad_x) : at::Tensor();
  at::Tensor dx, partials;
  if (want_x) dx = empty_cuda(x.sizes(), x.options());
  if (want_w1) partials = empty_cuda({splits, w1.size(0), w1.size(1)}, g.coefficient.options());
  kernels::ConnectionWeightsInputBackward args;
  args.shape = shape;
  args.x = rows.const_data_ptr();
  args.grad_x = incoming.defined() ? incoming.const_data_ptr() : nullptr;
  args.w1 = first.const_data_ptr();
  args.grad_hidden = g.e.const_data_ptr();
  args.coefficient = g.coefficient.const_data_ptr<float>();
  args.dx = want_x ? dx.mutable_data_ptr() : nullptr;
  args.w1_partials = want_w1 ? partials.mutable_data_ptr<float>() : nullptr;
  args.splits = splits;
  C10_CUDA_CHECK(
      kernels::launch_connection_weights_input_backward(args, c10::cuda::getCurrentCUDAStream()));
  return {std::move(dx), std::move(partials)};
}

WeightsGradients connection_weights_backward_cuda(const at::Tensor& grad_weights,
                                                  const std::optional<at::Tensor>& grad_x,
                                                  const at::Tensor& x, const at::Tensor& w1,
                                                  const at::Tensor& w2, const at::Tensor& prior,
                                                  const WeightsForward& forward,
                                                  std::array<bool, 5> wanted) {
  check_connection_weights_backward(grad_weights, grad_x, x, w1, w2, prior, forward);
  const c10::cuda::CUDAGuard device_guard(x.device());
  const std::optional<at::Tensor>& scale = forward.options.scale;
  const auto shape = kernel_shape(x, w1, prior, forward.options);
  if (!shape) {
    return connection_weights_backward_composition(grad_weights, grad_x, x, w1, w2, prior, forward,
                                                   wanted);
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const auto [want_x, want_dw1, want_w2, want_prior, may_want_scale] = wanted;
  const bool want_scale = may_want_scale && scale.has_value(), want_w1 = want_dw1 || want_scale;
  const HiddenGradients g = backward_of_hidden(*shape, grad_weights, w2, forward, want_w2);
  at::Tensor dx, w1_partials;
  if (want_x || want_w1) {
    std::tie(dx, w1_partials) = backward_of_input(*shape, x, grad_x, w1, scale, g, want_x, want_w1);
  }

  const auto like = [](const at::Tensor& tensor, bool want) {
    return want ? empty_cuda(tensor.sizes(), tensor.options()) : at::Tensor();
  };
  at::Tensor dw1 = like(w1, want_w1), dw2 = like(w2, want_w2), dprior = like(prior, want_prior);
  const at::Tensor plain_w1 = want_scale ? aligned(w1) : at::Tensor();
  const at::Tensor factors = scale.has_value() ? scale->contiguous() : at::Tensor();
  at::Tensor scale_partials, dscale;
  if (want_scale) {
    scale_partials =
        empty_cuda({kernels::reduce_rows(shape->hidden), shape->dim}, g.coefficient.options());
  }
  const auto floats = [](const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<float>() : nullptr;
  };
  const auto data = [](const at::Tensor& t) {
    return t.defined() ? t.mutable_data_ptr() : nullptr;
  };
  kernels::ConnectionWeightsReduce reduce;
  reduce.shape = *shape;
  reduce.w1_partials = floats(w1_partials);
  reduce.splits = want_w1 ? static_cast<int>(w1_partials.size(0)) : 0;
  reduce.dw1 = data(dw1);
  reduce.w1 = want_scale ? plain_w1.const_data_ptr() : nullptr;
  reduce.scale = factors.defined() ? factors.const_data_ptr() : nullptr;
  reduce.scale_float32 = factors.defined() && factors.scalar_type() == at::kFloat;
  reduce.scale_partials = floats(scale_partials);
  reduce.w2_partials = floats(g.w2_partials);
  reduce.prior_partials = floats(g.prior_partials);
  reduce.groups = g.prior_partials.size(0);
  reduce.dw2 = data(dw2);
  reduce.dprior = data(dprior);
  reduce.prior_float32 = prior.scalar_type() == at::kFloat;
  C10_CUDA_CHECK(
      kernels::launch_connection_weights_reduce(reduce, c10::cuda::getCurrentCUDAStream()));
  if (want_scale) dscale = sum_rows(scale_partials, *scale);

  const auto given = [&x](const at::Tensor& tensor) {
    return tensor.defined() ? tensor : empty_cuda({0}, x.options());
  };
  return {given(dx), want_dw1 ? dw1 : given({}), given(dw2), given(dprior), given(dscale)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CUDA, m) {
  m.impl("connection_weights", flat<connection_weights_cuda>);
  m.impl("connection_weights_forward", flat<connection_weights_forward_cuda>);
  m.impl("connection_weights_backward", flat<connection_weights_backward_cuda>);
}

}  // namespace muddformer::detail
