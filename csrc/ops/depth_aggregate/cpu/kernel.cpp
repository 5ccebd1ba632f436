// Aggregation of hidden states over depth on the CPU: see kernel.h for the formulas.
//
// Both kernels are bound by memory: each row of each source is read once. The forward walks over a
// row in strips that fit the vector registers and sums all sources into C accumulators a strip. The
// backward keeps the C gradient rows of a token in the first-level cache and walks over the
// sources, one or two at a time: their gradients are finished and their C dot products are taken in
// the same pass. As many streams as sources are more than the hardware follows, so the same place
// of the next token is prefetched.
//
// Histories that fit the caches are bound by instructions, stores above all (AMD's Zen 4 takes two
// cycles for one of 64 bytes), so sums must live in registers. Compilers keep an array there where
// every index is a constant early on and no loop constructs it: hence ForcedUnroll and zeros().
#include "kernel.h"

#include <c10/util/Unroll.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../../common/cpu_packs.h"

namespace muddformer::cpu {
namespace {

using at::vec::Vectorized;
using c10::ForcedUnroll;

template <typename Vec, size_t kCount>
inline std::array<Vec, kCount> zeros() {
  return []<size_t... i>(std::index_sequence<i...>) {
    return std::array<Vec, kCount>{(static_cast<void>(i), Vec(0))...};
  }(std::make_index_sequence<kCount>());
}

// One line of the next token's row into the second-level cache; harmless past the end.
inline void prefetch(const void* address) {
  __builtin_prefetch(address, /*rw=*/0, /*locality=*/2);
}

constexpr int kLine = 64;

template <typename scalar_t>
inline void prefetch_elements(const scalar_t* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / int64_t{sizeof(scalar_t)}) prefetch(from + i);
}

// A store past the caches, for results that are read much later; `to` is aligned to the vector.
template <typename V, typename T>
inline void store_past_caches(const V& v, T* to) {
#if defined(CPU_CAPABILITY_AVX512)
  __m512i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), bits);
#elif defined(CPU_CAPABILITY_AVX2)
  __m256i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits);
#else
  v.store(to);
#endif
}

template <typename T>
inline T horizontal_sum(const Vectorized<T>& v) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    return at::vec::vec_reduce_all<float>([](const auto& a, const auto& b) { return a + b; }, v);
  }
#endif
  alignas(64) T lanes[Vectorized<T>::size()];
  v.store(lanes);
  for (int width = Vectorized<T>::size() / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

// The weights of token t, way-major, in the accumulation type.
template <typename scalar_t, typename Args>
inline void load_weights(const Args& args, int64_t t, accumulate_t<scalar_t>* to) {
  const scalar_t* from = static_cast<const scalar_t*>(args.weights) + t * args.token_stride;
  for (int64_t c = 0; c < args.ways; ++c) {
    for (int64_t j = 0; j < args.sources; ++j) {
      to[c * args.sources + j] =
          static_cast<accumulate_t<scalar_t>>(from[c * args.way_stride + j * args.source_stride]);
    }
  }
}

// One strip of kPacks packs of kWays ways, starting at way `first`. rows: row t of every source.
template <typename scalar_t, int kWays, int kPacks, bool kWhole>
inline void forward_strip(const AggregateForward& args, const scalar_t* const* rows,
                          const accumulate_t<scalar_t>* weights, int64_t first, int64_t t,
                          int64_t d, int64_t count) {
  using P = Pack<scalar_t>;
  using Vec = typename P::Vec;
  constexpr int kVectors = kPacks * P::kVectors;
  constexpr int64_t kFollowed = 8;  // streams that the hardware prefetches better alone
  constexpr ForcedUnroll<kWays> each_way;
  constexpr ForcedUnroll<kPacks> each_pack;
  constexpr ForcedUnroll<kVectors> each_vector;
  auto sums = zeros<Vec, kWays * kVectors>();
  for (int64_t j = 0; j < args.sources; ++j) {
    const scalar_t* row = rows[j] + d;
    Vec x[kVectors];
    if (args.sources > kFollowed) prefetch_elements(row + args.x_stride[j], kPacks * P::kElements);
    each_pack([&](auto p) {
      P::template load<kWhole>(row + p * P::kElements, count, x + p * P::kVectors);
    });
    each_way([&](auto c) {
      const Vec w(weights[(first + c) * args.sources + j]);
      each_vector([&](auto v) {
        Vec& sum = sums[c * kVectors + v];
        sum = at::vec::fmadd(w, x[v], sum);
      });
    });
  }
  each_way([&](auto c) {
    scalar_t* row = static_cast<scalar_t*>(args.y[first + c]) + t * args.width + d;
    each_pack([&](auto p) {
      P::template store<kWhole>(&sums[c * kVectors + p * P::kVectors], row + p * P::kElements,
                                count);
    });
  });
}

template <typename scalar_t, int kPacks, bool kWhole = true>
inline void forward_strip_all_ways(const AggregateForward& args, const scalar_t* const* rows,
                                   const accumulate_t<scalar_t>* weights, int64_t t, int64_t d,
                                   int64_t count = 0) {
  int64_t c = 0;
  for (; c + 4 <= args.ways; c += 4) {
    forward_strip<scalar_t, 4, kPacks, kWhole>(args, rows, weights, c, t, d, count);
  }
  switch (args.ways - c) {
    case 3:
      forward_strip<scalar_t, 3, kPacks, kWhole>(args, rows, weights, c, t, d, count);
      break;
    case 2:
      forward_strip<scalar_t, 2, kPacks, kWhole>(args, rows, weights, c, t, d, count);
      break;
    case 1:
      forward_strip<scalar_t, 1, kPacks, kWhole>(args, rows, weights, c, t, d, count);
      break;
    default:
      break;
  }
}

template <typename scalar_t>
void forward(const AggregateForward& args, int64_t begin, int64_t end, void* scratch) {
  using P = Pack<scalar_t>;
  // 16 accumulators for 4 ways of 4 vectors where there are 32 registers, 8 where there are 16.
  constexpr int kRegisters = sizeof(Vectorized<float>) == 64 ? 4 : 2;
  constexpr int kPacks = kRegisters / P::kVectors;
  constexpr int64_t kStrip = kPacks * P::kElements;
  auto** rows = static_cast<const scalar_t**>(scratch);
  auto* weights = reinterpret_cast<accumulate_t<scalar_t>*>(rows + args.sources);
  for (int64_t t = begin; t < end; ++t) {
    load_weights<scalar_t>(args, t, weights);
    for (int64_t j = 0; j < args.sources; ++j) {
      rows[j] = static_cast<const scalar_t*>(args.x[j]) + t * args.x_stride[j];
    }
    int64_t d = 0;
    for (; d + kStrip <= args.width; d += kStrip) {
      forward_strip_all_ways<scalar_t, kPacks>(args, rows, weights, t, d);
    }
    for (; d + P::kElements <= args.width; d += P::kElements) {
      forward_strip_all_ways<scalar_t, 1>(args, rows, weights, t, d);
    }
    if (d < args.width) {
      forward_strip_all_ways<scalar_t, 1, false>(args, rows, weights, t, d, args.width - d);
    }
  }
}

// Ways first..first+kWays-1 of sources j..j+kSources-1 of token t. dy: row t of every gradient of
// an output. With more than one group of ways, the gradients of the sources stay in `partial`
// between the groups, so that they are rounded once.
template <typename scalar_t, int kWays, int kSources>
inline void backward_rows(const AggregateBackward& args, const accumulate_t<scalar_t>* weights,
                          const accumulate_t<scalar_t>* const* dy, int64_t first, int64_t t,
                          int64_t j, accumulate_t<scalar_t>* partial, int64_t partial_stride) {
  using P = Pack<scalar_t>;
  using Vec = typename P::Vec;
  constexpr ForcedUnroll<kSources> each_source;
  constexpr ForcedUnroll<kWays> each_way;
  constexpr ForcedUnroll<P::kVectors> each_vector;
  const int64_t width = args.width;
  const bool is_first = first == 0;
  const bool is_last = first + kWays == args.ways;
  const scalar_t* x_row[kSources];
  const scalar_t* in_row[kSources];
  scalar_t* out_row[kSources];
  Vec w[kSources][kWays];
  each_source([&](auto s) {
    x_row[s] = static_cast<const scalar_t*>(args.x[j + s]) + t * args.x_stride[j + s];
    in_row[s] = static_cast<const scalar_t*>(args.grad_hiddens[j + s]);
    if (in_row[s] != nullptr) in_row[s] += t * args.grad_hidden_stride[j + s];
    out_row[s] = static_cast<scalar_t*>(args.grad_x[j + s]) + t * width;
    each_way([&](auto c) { w[s][c] = Vec(weights[(first + c) * args.sources + j + s]); });
  });
  auto sums = zeros<Vec, kSources * kWays * P::kVectors>();
  for_each_pack<P>(width, [&](auto whole, int64_t d, int64_t count) {
    constexpr bool kWhole = decltype(whole)::value;
    Vec x[kSources][P::kVectors];
    Vec dx[kSources][P::kVectors];
    each_source([&](auto s) {
      prefetch(x_row[s] + d + args.x_stride[j + s]);
      P::template load<kWhole>(x_row[s] + d, count, x[s]);
      if (!is_first) {
        each_vector([&](auto v) {
          dx[s][v] = Vec::loadu(partial + s * partial_stride + d + v * Vec::size());
        });
      } else if (in_row[s] != nullptr) {
        prefetch(in_row[s] + d + args.grad_hidden_stride[j + s]);
        P::template load<kWhole>(in_row[s] + d, count, dx[s]);
      } else {
        each_vector([&](auto v) { dx[s][v] = Vec(0); });
      }
    });
    each_way([&](auto c) {
      each_vector([&](auto v) {
        const accumulate_t<scalar_t>* from = dy[first + c] + d + v * Vec::size();
        const Vec g = kWhole || P::kReduced ? Vec::loadu(from) : Vec::loadu(from, count);
        each_source([&](auto s) {
          Vec& sum = sums[(s * kWays + c) * P::kVectors + v];
          sum = at::vec::fmadd(g, x[s][v], sum);
          dx[s][v] = at::vec::fmadd(w[s][c], g, dx[s][v]);
        });
      });
    });
    each_source([&](auto s) {
      if (is_last && args.past_caches) {
        store_past_caches(P::pack(dx[s]), out_row[s] + d);
      } else if (is_last) {
        P::template store<kWhole>(dx[s], out_row[s] + d, count);
      } else {
        each_vector(
            [&](auto v) { dx[s][v].store(partial + s * partial_stride + d + v * Vec::size()); });
      }
    });
  });
  scalar_t* grad_weights = static_cast<scalar_t*>(args.grad_weights) + t * args.ways * args.sources;
  each_source([&](auto s) {
    each_way([&](auto c) {
      const int i = (s * kWays + c) * P::kVectors;
      Vec sum = sums[i];
      if constexpr (P::kVectors == 2) sum = sum + sums[i + 1];
      grad_weights[(first + c) * args.sources + j + s] = static_cast<scalar_t>(horizontal_sum(sum));
    });
  });
}

template <typename scalar_t, int kSources>
inline void backward_rows_all_ways(const AggregateBackward& args,
                                   const accumulate_t<scalar_t>* weights,
                                   const accumulate_t<scalar_t>* const* dy, int64_t t, int64_t j,
                                   accumulate_t<scalar_t>* partial, int64_t partial_stride) {
  int64_t c = 0;
  for (; c + 4 <= args.ways; c += 4) {
    backward_rows<scalar_t, 4, kSources>(args, weights, dy, c, t, j, partial, partial_stride);
  }
  switch (args.ways - c) {
    case 3:
      backward_rows<scalar_t, 3, kSources>(args, weights, dy, c, t, j, partial, partial_stride);
      break;
    case 2:
      backward_rows<scalar_t, 2, kSources>(args, weights, dy, c, t, j, partial, partial_stride);
      break;
    case 1:
      backward_rows<scalar_t, 1, kSources>(args, weights, dy, c, t, j, partial, partial_stride);
      break;
    default:
      break;
  }
}

template <typename scalar_t>
void backward(const AggregateBackward& args, int64_t begin, int64_t end, void* scratch) {
  using P = Pack<scalar_t>;
  using acc_t = accumulate_t<scalar_t>;
  // Two sources a pass where there are 32 registers: each gradient row is read half as often.
  constexpr int kSources = sizeof(Vectorized<float>) == 64 ? 2 : 1;
  // Rows of the scratch are padded to whole vectors.
  const int64_t stride = (args.width + kRowPadding - 1) / kRowPadding * kRowPadding;
  auto* zero = static_cast<acc_t*>(scratch);
  auto* converted = zero + stride;
  auto* partial = converted + (P::kReduced ? args.ways * stride : 0);
  auto** dy = reinterpret_cast<const acc_t**>(partial + kSources * stride);
  auto* weights = reinterpret_cast<acc_t*>(dy + args.ways);
  std::fill_n(zero, partial - zero, acc_t(0));
  for (int64_t t = begin; t < end; ++t) {
    load_weights<scalar_t>(args, t, weights);
    for (int64_t c = 0; c < args.ways; ++c) {
      if (args.grad_outputs[c] == nullptr) {
        dy[c] = zero;
        continue;
      }
      const scalar_t* row =
          static_cast<const scalar_t*>(args.grad_outputs[c]) + t * args.grad_output_stride[c];
      prefetch_elements(row + args.grad_output_stride[c], args.width);
      if constexpr (P::kReduced) {
        acc_t* to = converted + c * stride;
        dy[c] = to;
        for_each_pack<P>(args.width, [&](auto whole, int64_t d, int64_t count) {
          typename P::Vec loaded[P::kVectors];
          P::template load<decltype(whole)::value>(row + d, count, loaded);
          for (int v = 0; v < P::kVectors; ++v) loaded[v].store(to + d + v * P::Vec::size());
        });
      } else {
        dy[c] = row;
      }
    }
    int64_t j = 0;
    for (; j + kSources <= args.sources; j += kSources) {
      backward_rows_all_ways<scalar_t, kSources>(args, weights, dy, t, j, partial, stride);
    }
    for (; j < args.sources; ++j) {
      backward_rows_all_ways<scalar_t, 1>(args, weights, dy, t, j, partial, stride);
    }
  }
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if (args.past_caches) _mm_sfence();  // other threads read the gradients after this call
#endif
}

}  // namespace

// CPU_CAPABILITY names the instruction set that this file is being compiled for.
#if defined(CPU_CAPABILITY_AVX512)
#define MUDDFORMER_KERNELS aggregate_kernels_avx512
#elif defined(CPU_CAPABILITY_AVX2)
#define MUDDFORMER_KERNELS aggregate_kernels_avx2
#else
#define MUDDFORMER_KERNELS aggregate_kernels_default
#endif

const AggregateKernels MUDDFORMER_KERNELS = {
    {forward<double>, forward<float>, forward<c10::BFloat16>, forward<c10::Half>},
    {backward<double>, backward<float>, backward<c10::BFloat16>, backward<c10::Half>},
};

}  // namespace muddformer::cpu
