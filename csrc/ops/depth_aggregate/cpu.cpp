// The aggregation on the CPU: host side of cpu/kernel.h. Tokens are split between
// threads; every token is finished by one thread in one order, so results do not depend on the
// number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <memory>

#include "../common/cpu_dispatch.h"
#include "../common/recycled_memory.h"
#include "../common/rows.h"
#include "cpu/kernel.h"
#include "internal.h"

namespace muddformer::detail {
namespace {

cpu::AggregateKernels choose_kernels() {
#if defined(MUDDFORMER_X86_KERNELS)
  const std::string capability = cpu_capability();
  if (capability == "AVX512") {
    cpu::AggregateKernels kernels = cpu::aggregate_kernels_avx512;
    if (__builtin_cpu_supports("avx512bf16")) {
      kernels.forward[cpu::kBFloat16] = cpu::forward_bfloat16_avx512;
      kernels.backward[cpu::kBFloat16] = cpu::backward_bfloat16_avx512;
    }
    return kernels;
  }
  if (capability == "AVX2") return cpu::aggregate_kernels_avx2;
#endif
  return cpu::aggregate_kernels_default;
}

const cpu::AggregateKernels& aggregate_kernels() {
  static const cpu::AggregateKernels chosen = choose_kernels();
  return chosen;
}

// Weights [..., C, S] as [tokens, C, S]: a view costs more than all of a small call's other work.
struct WeightRows {
  WeightRows(const at::Tensor& weights, int64_t tokens) : tensor(weights) {
    const int64_t ways = weights.size(-2), sources = weights.size(-1);
    if (weights.is_contiguous()) {
      strides = {ways * sources, sources, 1};
    } else {
      tensor = weights.reshape({tokens, ways, sources});
      strides = {tensor.stride(0), tensor.stride(1), tensor.stride(2)};
    }
  }
  void* data() const { return tensor.data_ptr(); }

  at::Tensor tensor;
  std::array<int64_t, 3> strides{};
};

// Gradients of a history larger than the caches are next read when an earlier layer's backward has
// walked over all of it; written past the caches they cost no read of the lines that they replace.
bool write_past_caches(at::TensorList grads) {
  constexpr int64_t kCacheBytes = int64_t{4} << 20;
  const at::Tensor& first = grads[0];
  const int64_t element = first.element_size();
  return static_cast<int64_t>(grads.size()) * first.numel() * element > kCacheBytes &&
         first.size(-1) * element % cpu::kRowAlignment == 0 &&
         std::all_of(grads.begin(), grads.end(), [](const at::Tensor& grad) {
           return reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % cpu::kRowAlignment == 0;
         });
}

template <typename Args, typename Kernel>
void run(const Args& args, Kernel kernel, int64_t tokens) {
  constexpr int64_t kElementsPerThread = 32768;  // fewer are not worth another thread
  const int64_t elements = args.width * (args.sources + args.ways);
  at::parallel_for(0, tokens, std::max<int64_t>(1, kElementsPerThread / elements),
                   [&](int64_t begin, int64_t end) {
                     constexpr int64_t kLine = 64;
                     const int64_t lines =
                         cpu::scratch_bytes(args.sources, args.ways, args.width) / kLine + 1;
                     struct alignas(kLine) Line {
                       char bytes[kLine];
                     };
                     const auto scratch = std::make_unique_for_overwrite<Line[]>(lines);
                     kernel(args, begin, end, scratch.get());
                   });
}

std::vector<at::Tensor> depth_aggregate_cpu(at::TensorList hiddens, const at::Tensor& weights) {
  check_depth_aggregate(hiddens, weights);
  const at::Tensor& like = hiddens[0];
  const int64_t sources = weights.size(-1), ways = weights.size(-2), width = like.size(-1);
  std::vector<at::Tensor> outputs = cpu::recycled_outputs(ways, like);
  if (like.numel() == 0) return outputs;
  const int64_t tokens = like.numel() / width;
  const Rows x = rows_of(hiddens);
  const Rows y = rows_of(outputs);
  const WeightRows w(weights, tokens);
  const cpu::AggregateForward args{sources,      ways,        width,        x.pointers(),
                                   x.strides(),  w.data(),    w.strides[0], w.strides[1],
                                   w.strides[2], y.pointers()};
  run(args, aggregate_kernels().forward[cpu_kernel_dtype(like.scalar_type())], tokens);
  return outputs;
}

std::tuple<std::vector<at::Tensor>, at::Tensor> depth_aggregate_backward_cpu(
    const OptionalTensors& grad_outputs, const OptionalTensors& grad_hiddens,
    at::TensorList hiddens, const at::Tensor& weights, int64_t deferred) {
  check_depth_aggregate_backward(grad_outputs, grad_hiddens, hiddens, weights, deferred);
  const at::Tensor& like = hiddens[0];
  const int64_t sources = weights.size(-1), ways = weights.size(-2), width = like.size(-1);
  // Those of deferred sources are made and dropped: deferring pays on GPUs.
  std::vector<at::Tensor> grads = cpu::recycled_outputs(sources, like);
  const auto kept = grads.begin() + deferred;
  if (like.numel() == 0) {
    return {{kept, grads.end()}, at::zeros(weights.sizes(), weights.options())};
  }
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  const int64_t tokens = like.numel() / width;
  const Rows x = rows_of(hiddens);
  const Rows dy = rows_of(grad_outputs, ways);
  const Rows incoming = rows_of(grad_hiddens, sources);
  const Rows dx = rows_of(grads);
  const WeightRows w(weights, tokens);
  const cpu::AggregateBackward args{sources,
                                    ways,
                                    width,
                                    x.pointers(),
                                    x.strides(),
                                    w.data(),
                                    w.strides[0],
                                    w.strides[1],
                                    w.strides[2],
                                    dy.pointers(),
                                    dy.strides(),
                                    incoming.pointers(),
                                    incoming.strides(),
                                    dx.pointers(),
                                    grad_weights.data_ptr(),
                                    write_past_caches(grads)};
  run(args, aggregate_kernels().backward[cpu_kernel_dtype(like.scalar_type())], tokens);
  return {{kept, grads.end()}, std::move(grad_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(muddformer, CPU, m) {
  m.impl("depth_aggregate", depth_aggregate_cpu);
  m.impl("depth_aggregate_backward", depth_aggregate_backward_cpu);
}

}  // namespace muddformer::detail
