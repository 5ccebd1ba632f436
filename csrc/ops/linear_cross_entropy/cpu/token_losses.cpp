// From logits to losses and gradients on the CPU: see token_losses.h.
//
// A row is read three times, out of the caches but for the first: for its largest logit m; for the
// sums of e^(x - m), which are left where the gradients come; and to make these of them. So each
// exponential is computed once, and nothing overflows.
#include "token_losses.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>

#include "../../common/cpu_packs.h"

namespace muddformer::cpu {
namespace {

// Calls f(x, first) for all packs of a row: x[v] are its vectors, `first` its first entry. What a last
// pack lacks is -infinity.
template <typename scalar_t, typename F>
inline void each_pack(const scalar_t* row, int64_t width, const F& f) {
  using P = Pack<scalar_t>;
  using Vec = typename P::Vec;
  using acc_t = accumulate_t<scalar_t>;
  for_each_pack<P>(width, [&](auto whole, int64_t first, int64_t count) {
    Vec x[P::kVectors];
    P::template load<decltype(whole)::value>(row + first, count, x);
    if constexpr (!decltype(whole)::value) {
      for (int v = 0; v < P::kVectors; ++v) {
        const auto there = std::clamp<int64_t>(count - v * Vec::size(), 0, Vec::size());
        x[v] = Vec::set(Vec(-std::numeric_limits<acc_t>::infinity()), x[v], there);
      }
    }
    f(x, first);
  });
}

template <typename acc_t, typename F>
inline acc_t reduced(const at::vec::Vectorized<acc_t>& vector, const F& f) {
  acc_t lanes[at::vec::Vectorized<acc_t>::size()];
  vector.store(lanes);
  return std::accumulate(std::begin(lanes) + 1, std::end(lanes), lanes[0], f);
}

template <typename P>
inline auto total_of(const typename P::Vec* sums) {
  typename P::Vec total = sums[0];
  for (int v = 1; v < P::kVectors; ++v) total = total + sums[v];
  return reduced(total, [](auto a, auto b) { return a + b; });
}

template <typename scalar_t>
void token_losses(const TokenLosses& args, int64_t begin, int64_t end) {
  using P = Pack<scalar_t>;
  using Vec = typename P::Vec;
  using acc_t = accumulate_t<scalar_t>;
  const auto smoothing = static_cast<acc_t>(args.label_smoothing);
  const auto z = static_cast<acc_t>(args.z_loss);
  const auto classes = static_cast<acc_t>(args.classes);
  auto* losses = static_cast<acc_t*>(args.losses);
  for (int64_t t = begin; t < end; ++t) {
    const scalar_t* row = static_cast<const scalar_t*>(args.logits) + t * args.stride;
    acc_t* grad =
        args.gradients == nullptr ? nullptr : static_cast<acc_t*>(args.gradients) + t * args.stride;
    const int64_t target = args.targets[t];
    if (target == args.ignore_index) {
      losses[t] = 0;
      if (grad != nullptr) std::fill_n(grad, args.classes, acc_t(0));
      continue;
    }
    Vec largest(-std::numeric_limits<acc_t>::infinity());
    each_pack(row, args.classes, [&](const Vec* x, int64_t) {
      for (int v = 0; v < P::kVectors; ++v) largest = at::vec::maximum(largest, x[v]);
    });
    const acc_t m = reduced(largest, [](acc_t a, acc_t b) { return std::max(a, b); });
    // What is not a number is one of the terms, and so comes to the loss and to all gradients.
    const acc_t of_target = static_cast<acc_t>(row[target]) - m;
    Vec sums[P::kVectors], plain[P::kVectors];  // of e^(x - m) and of x - m
    std::fill_n(sums, P::kVectors, Vec(0));
    std::fill_n(plain, P::kVectors, Vec(0));
    each_pack(row, args.classes, [&](const Vec* x, int64_t first) {
      for (int v = 0; v < P::kVectors; ++v) {
        const int64_t at = first + v * Vec::size();
        const auto there = std::clamp<int64_t>(args.classes - at, 0, Vec::size());
        const Vec shifted = x[v] - Vec(m), e = shifted.exp();
        sums[v] = sums[v] + e;
        if (smoothing > 0) plain[v] = plain[v] + Vec::set(Vec(0), shifted, there);
        if (grad == nullptr) continue;
        if (there == Vec::size()) {
          e.store(grad + at);
        } else if (there > 0) {
          e.store(grad + at, there);
        }
      }
    });
    const acc_t sum = total_of<P>(sums);
    const acc_t log_sum = std::log(sum), lse = m + log_sum;
    acc_t loss = log_sum - (1 - smoothing) * of_target;
    if (smoothing > 0) loss -= smoothing * total_of<P>(plain) / classes;
    if (z > 0) loss += z * lse * lse;
    losses[t] = loss;
    if (grad == nullptr) continue;
    const acc_t g =
        args.grad_losses == nullptr ? acc_t(1) : static_cast<const acc_t*>(args.grad_losses)[t];
    const acc_t scale = g * (1 + 2 * z * lse) / sum, shared = g * smoothing / classes;
    for (int64_t v = 0; v < args.classes; ++v) grad[v] = grad[v] * scale - shared;
    grad[target] -= g * (1 - smoothing);
  }
}

}  // namespace

// CPU_CAPABILITY names the instruction set that this file is being compiled for.
#if defined(CPU_CAPABILITY_AVX512)
#define MUDDFORMER_KERNELS token_losses_avx512
#elif defined(CPU_CAPABILITY_AVX2)
#define MUDDFORMER_KERNELS token_losses_avx2
#else
#define MUDDFORMER_KERNELS token_losses_default
#endif

const TokenLossesKernels MUDDFORMER_KERNELS = {{token_losses<double>, token_losses<float>,
                                                token_losses<c10::BFloat16>,
                                                token_losses<c10::Half>}};

}  // namespace muddformer::cpu
