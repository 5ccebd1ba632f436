// Aggregation of hidden states over depth on the CPU: see depth_aggregate_kernel.h for the
// formulas.
//
// Both kernels are bound by memory: each row of each source is read once. The forward walks over a
// row in strips that fit the vector registers and sums all sources into C accumulators a strip. The
// backward keeps the C gradient rows of a token in the first-level cache and walks over the
// sources, one or two at a time: their gradients are finished and their C dot products are taken in
// the same pass. As many streams as sources are more than the hardware follows, so the same place
// of the next token is prefetched.
#include "depth_aggregate_kernel.h"

#include <ATen/cpu/vec/functional.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>

namespace muddformer::cpu {
namespace {

using at::vec::Vectorized;

template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// kPack vectors of the accumulation type hold as many elements as one vector of scalar_t.
template <typename scalar_t>
struct Pack {
  using Vec = Vectorized<accumulate_t<scalar_t>>;
  static constexpr bool kReduced = !std::is_same_v<scalar_t, accumulate_t<scalar_t>>;
  static constexpr int kVectors = kReduced ? 2 : 1;
  static constexpr int kElements = Vectorized<scalar_t>::size();

  static inline void load(const scalar_t* from, int64_t count, Vec* to) {
    const auto loaded = count == kElements ? Vectorized<scalar_t>::loadu(from)
                                           : Vectorized<scalar_t>::loadu(from, count);
    if constexpr (kReduced) {
      std::tie(to[0], to[1]) = at::vec::convert_to_float<scalar_t>(loaded);
    } else {
      to[0] = loaded;
    }
  }

  static inline Vectorized<scalar_t> pack(const Vec* from) {
    if constexpr (kReduced) {
      return at::vec::convert_from_float<scalar_t>(from[0], from[1]);
    } else {
      return from[0];
    }
  }

  static inline void store(const Vec* from, scalar_t* to, int64_t count) {
    const Vectorized<scalar_t> packed = pack(from);
    if (count == kElements) {
      packed.store(to);
    } else {
      packed.store(to, count);
    }
  }
};

// One line of the next token's row into the second-level cache; harmless past the end.
inline void prefetch(const void* address) {
  __builtin_prefetch(address, /*rw=*/0, /*locality=*/2);
}

constexpr int kLine = 64;

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

// One strip of kPacks packs (the last one may be partial) of kWays ways, starting at way `first`.
// rows: row t of every source.
template <typename scalar_t, int kWays, int kPacks>
inline void forward_strip(const AggregateForward& args, const scalar_t* const* rows,
                          const accumulate_t<scalar_t>* weights, int64_t first, int64_t t,
                          int64_t d, int64_t last_count) {
  using P = Pack<scalar_t>;
  using Vec = typename P::Vec;
  constexpr int kVectors = kPacks * P::kVectors;
  Vec sums[kWays][kVectors];
  for (auto& way : sums) {
    for (Vec& v : way) v = Vec(0);
  }
  for (int64_t j = 0; j < args.sources; ++j) {
    const scalar_t* row = rows[j] + d;
    Vec x[kVectors];
    const char* next = reinterpret_cast<const char*>(row + args.x_stride[j]);
    for (int64_t b = 0; b < kPacks * P::kElements * int64_t{sizeof(scalar_t)}; b += kLine) {
      prefetch(next + b);
    }
    for (int p = 0; p < kPacks; ++p) {
      P::load(row + p * P::kElements, p + 1 < kPacks ? P::kElements : last_count,
              x + p * P::kVectors);
    }
    for (int c = 0; c < kWays; ++c) {
      const Vec w(weights[(first + c) * args.sources + j]);
      for (int v = 0; v < kVectors; ++v) sums[c][v] = at::vec::fmadd(w, x[v], sums[c][v]);
    }
  }
  for (int c = 0; c < kWays; ++c) {
    scalar_t* row = static_cast<scalar_t*>(args.y[first + c]) + t * args.width + d;
    for (int p = 0; p < kPacks; ++p) {
      P::store(sums[c] + p * P::kVectors, row + p * P::kElements,
               p + 1 < kPacks ? P::kElements : last_count);
    }
  }
}

template <typename scalar_t, int kPacks>
inline void forward_strip_all_ways(const AggregateForward& args, const scalar_t* const* rows,
                                   const accumulate_t<scalar_t>* weights, int64_t t, int64_t d,
                                   int64_t last_count) {
  int64_t c = 0;
  for (; c + 4 <= args.ways; c += 4) {
    forward_strip<scalar_t, 4, kPacks>(args, rows, weights, c, t, d, last_count);
  }
  switch (args.ways - c) {
    case 3:
      forward_strip<scalar_t, 3, kPacks>(args, rows, weights, c, t, d, last_count);
      break;
    case 2:
      forward_strip<scalar_t, 2, kPacks>(args, rows, weights, c, t, d, last_count);
      break;
    case 1:
      forward_strip<scalar_t, 1, kPacks>(args, rows, weights, c, t, d, last_count);
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
      forward_strip_all_ways<scalar_t, kPacks>(args, rows, weights, t, d, P::kElements);
    }
    for (; d < args.width; d += P::kElements) {
      const int64_t count = std::min<int64_t>(P::kElements, args.width - d);
      forward_strip_all_ways<scalar_t, 1>(args, rows, weights, t, d, count);
    }
  }
}

// Ways first..first+kWays-1 of sources j..j+kSources-1 of token t. With more than one group of
// ways, the gradients of the sources stay in `partial` between the groups, so that they are rounded
// once.
template <typename scalar_t, int kWays, int kSources>
inline void backward_rows(const AggregateBackward& args, const accumulate_t<scalar_t>* weights,
                          const accumulate_t<scalar_t>* dy, int64_t dy_stride, int64_t first,
                          int64_t t, int64_t j, accumulate_t<scalar_t>* partial) {
  using P = Pack<scalar_t>;
  using Vec = typename P::Vec;
  const int64_t width = args.width;
  const bool is_first = first == 0;
  const bool is_last = first + kWays == args.ways;
  const scalar_t* x_row[kSources];
  const scalar_t* in_row[kSources];
  scalar_t* out_row[kSources];
  Vec w[kSources][kWays];
  Vec sums[kSources][kWays][P::kVectors];
  for (int s = 0; s < kSources; ++s) {
    x_row[s] = static_cast<const scalar_t*>(args.x[j + s]) + t * args.x_stride[j + s];
    in_row[s] = static_cast<const scalar_t*>(args.grad_hiddens[j + s]);
    if (in_row[s] != nullptr) in_row[s] += t * args.grad_hidden_stride[j + s];
    out_row[s] = static_cast<scalar_t*>(args.grad_x[j + s]) + t * width;
    for (int c = 0; c < kWays; ++c) {
      w[s][c] = Vec(weights[(first + c) * args.sources + j + s]);
      for (Vec& v : sums[s][c]) v = Vec(0);
    }
  }
  for (int64_t d = 0; d < width; d += P::kElements) {
    const int64_t count = std::min<int64_t>(P::kElements, width - d);
    Vec x[kSources][P::kVectors];
    Vec dx[kSources][P::kVectors];
    for (int s = 0; s < kSources; ++s) {
      prefetch(x_row[s] + d + args.x_stride[j + s]);
      P::load(x_row[s] + d, count, x[s]);
      if (!is_first) {
        for (int v = 0; v < P::kVectors; ++v) {
          dx[s][v] = Vec::loadu(partial + s * dy_stride + d + v * Vec::size());
        }
      } else if (in_row[s] != nullptr) {
        prefetch(in_row[s] + d + args.grad_hidden_stride[j + s]);
        P::load(in_row[s] + d, count, dx[s]);
      } else {
        for (Vec& v : dx[s]) v = Vec(0);
      }
    }
    for (int c = 0; c < kWays; ++c) {
      for (int v = 0; v < P::kVectors; ++v) {
        const Vec g = Vec::loadu(dy + (first + c) * dy_stride + d + v * Vec::size());
        for (int s = 0; s < kSources; ++s) {
          sums[s][c][v] = at::vec::fmadd(g, x[s][v], sums[s][c][v]);
          dx[s][v] = at::vec::fmadd(w[s][c], g, dx[s][v]);
        }
      }
    }
    for (int s = 0; s < kSources; ++s) {
      if (is_last && args.past_caches) {
        store_past_caches(P::pack(dx[s]), out_row[s] + d);
      } else if (is_last) {
        P::store(dx[s], out_row[s] + d, count);
      } else {
        for (int v = 0; v < P::kVectors; ++v) {
          dx[s][v].store(partial + s * dy_stride + d + v * Vec::size());
        }
      }
    }
  }
  scalar_t* grad_weights = static_cast<scalar_t*>(args.grad_weights) + t * args.ways * args.sources;
  for (int s = 0; s < kSources; ++s) {
    for (int c = 0; c < kWays; ++c) {
      Vec sum = sums[s][c][0];
      if constexpr (P::kVectors == 2) sum = sum + sums[s][c][1];
      grad_weights[(first + c) * args.sources + j + s] = static_cast<scalar_t>(horizontal_sum(sum));
    }
  }
}

template <typename scalar_t, int kSources>
inline void backward_rows_all_ways(const AggregateBackward& args,
                                   const accumulate_t<scalar_t>* weights,
                                   const accumulate_t<scalar_t>* dy, int64_t dy_stride, int64_t t,
                                   int64_t j, accumulate_t<scalar_t>* partial) {
  int64_t c = 0;
  for (; c + 4 <= args.ways; c += 4) {
    backward_rows<scalar_t, 4, kSources>(args, weights, dy, dy_stride, c, t, j, partial);
  }
  switch (args.ways - c) {
    case 3:
      backward_rows<scalar_t, 3, kSources>(args, weights, dy, dy_stride, c, t, j, partial);
      break;
    case 2:
      backward_rows<scalar_t, 2, kSources>(args, weights, dy, dy_stride, c, t, j, partial);
      break;
    case 1:
      backward_rows<scalar_t, 1, kSources>(args, weights, dy, dy_stride, c, t, j, partial);
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
  // Rows of the scratch are padded with zeros to whole vectors.
  const int64_t dy_stride = (args.width + kRowPadding - 1) / kRowPadding * kRowPadding;
  auto* dy = static_cast<acc_t*>(scratch);
  auto* partial = dy + args.ways * dy_stride;
  auto* weights = partial + kSources * dy_stride;
  std::fill_n(dy, args.ways * dy_stride, acc_t(0));
  for (int64_t t = begin; t < end; ++t) {
    load_weights<scalar_t>(args, t, weights);
    for (int64_t c = 0; c < args.ways; ++c) {
      if (args.grad_outputs[c] == nullptr) continue;
      const scalar_t* row =
          static_cast<const scalar_t*>(args.grad_outputs[c]) + t * args.grad_output_stride[c];
      for (int64_t d = 0; d < args.width; d += P::kElements) {
        typename P::Vec loaded[P::kVectors];
        prefetch(row + d + args.grad_output_stride[c]);
        P::load(row + d, std::min<int64_t>(P::kElements, args.width - d), loaded);
        for (int v = 0; v < P::kVectors; ++v) {
          loaded[v].store(dy + c * dy_stride + d + v * P::Vec::size());
        }
      }
    }
    int64_t j = 0;
    for (; j + kSources <= args.sources; j += kSources) {
      backward_rows_all_ways<scalar_t, kSources>(args, weights, dy, dy_stride, t, j, partial);
    }
    for (; j < args.sources; ++j) {
      backward_rows_all_ways<scalar_t, 1>(args, weights, dy, dy_stride, t, j, partial);
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
