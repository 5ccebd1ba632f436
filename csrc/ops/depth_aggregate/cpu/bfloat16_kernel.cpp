// Aggregation of bfloat16 hidden states on CPUs with AVX512-BF16: see kernel.h for the formulas.
//
// vdpbf16ps multiplies 32 pairs of bfloat16 numbers and adds neighbouring products to 16 float32
// sums: no conversions. The forward takes the rows of two sources interleaved, so that a pair is
// (X_j[d], X_j+1[d]) and meets the weights (w_cj, w_cj+1) broadcast. The gradients of the sources
// take the rows of two ways in the same manner, interleaved once a token for all sources; the
// gradients of the weights are dot products of the rows as they are. Interleaving within 128-bit
// lanes gives two registers, "low" and "high", of the sums of 32 elements, in an order that
// store() undoes.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "kernel.h"

namespace muddformer::cpu {
namespace {

constexpr int64_t kBlock = 32;  // elements of one register
constexpr int kMaxWays = 4;
using Element = uint16_t;  // the bits of a bfloat16 number
static_assert(kRowPadding >= kBlock);

inline __m512bh pairs(__m512i v) {
  return reinterpret_cast<__m512bh>(v);
}

inline __m512i low(__m512i a, __m512i b) {
  return _mm512_unpacklo_epi16(a, b);
}
inline __m512i high(__m512i a, __m512i b) {
  return _mm512_unpackhi_epi16(a, b);
}

// A block, or what is left of a row.
inline __m512i load(const Element* from, int64_t count) {
  if (count >= kBlock) return _mm512_loadu_si512(from);
  return _mm512_maskz_loadu_epi16((uint32_t{1} << count) - 1, from);
}

// Rounds the sums of a block and brings them back into the order of the row.
inline __m512i round_block(__m512 low_sums, __m512 high_sums) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm512_permutexvar_epi64(
      order, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high_sums, low_sums)));
}

inline void store(__m512i block, Element* to, int64_t count) {
  if (count >= kBlock) {
    _mm512_storeu_si512(to, block);
  } else {
    _mm512_mask_storeu_epi16(to, (uint32_t{1} << count) - 1, block);
  }
}

inline void prefetch(const void* address) {
  __builtin_prefetch(address, /*rw=*/0, /*locality=*/2);
}

inline __m512i broadcast_pair(Element first, Element second) {
  return _mm512_set1_epi32(static_cast<int>(uint32_t{second} << 16 | first));
}

inline Element round_one(float value) {
  return static_cast<Element>(
      _mm_extract_epi16(reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_set_ss(value))), 0));
}

// ---- forward --------------------------------------------------------------------------------

// The weights of token t, [kWays][pairs of sources]; the last of an odd number is paired with zero.
template <int kWays>
inline void load_weight_pairs(const AggregateForward& args, int64_t t, uint32_t* to) {
  const Element* from = static_cast<const Element*>(args.weights) + t * args.token_stride;
  for (int c = 0; c < kWays; ++c) {
    const Element* row = from + c * args.way_stride;
    for (int64_t j = 0; j < args.sources; j += 2) {
      const uint32_t second = j + 1 < args.sources ? row[(j + 1) * args.source_stride] : 0;
      *to++ = second << 16 | row[j * args.source_stride];
    }
  }
}

// kBlocks blocks of a token; the last one may be partial, with `count` elements.
template <int kWays, int kBlocks>
inline void forward_strip(const AggregateForward& args, const Element* const* rows,
                          const uint32_t* weights, int64_t t, int64_t d, int64_t count) {
  __m512 sums[kWays][kBlocks][2];
  for (auto& way : sums) {
    for (auto& block : way) block[0] = block[1] = _mm512_setzero_ps();
  }
  const int64_t source_pairs = (args.sources + 1) / 2;
  for (int64_t p = 0; p < source_pairs; ++p) {
    const bool both = 2 * p + 1 < args.sources;
    const Element* first = rows[2 * p] + d;
    const Element* second = rows[both ? 2 * p + 1 : 2 * p] + d;
    __m512i x[kBlocks][2];
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t n = b + 1 < kBlocks ? kBlock : count;
      prefetch(first + b * kBlock + args.x_stride[2 * p]);
      const __m512i even = load(first + b * kBlock, n);
      __m512i odd = _mm512_setzero_si512();
      if (both) {
        prefetch(second + b * kBlock + args.x_stride[2 * p + 1]);
        odd = load(second + b * kBlock, n);
      }
      x[b][0] = low(even, odd);
      x[b][1] = high(even, odd);
    }
    for (int c = 0; c < kWays; ++c) {
      const __m512i w = _mm512_set1_epi32(static_cast<int>(weights[c * source_pairs + p]));
      for (int b = 0; b < kBlocks; ++b) {
        for (int h = 0; h < 2; ++h) {
          sums[c][b][h] = _mm512_dpbf16_ps(sums[c][b][h], pairs(x[b][h]), pairs(w));
        }
      }
    }
  }
  for (int c = 0; c < kWays; ++c) {
    Element* row = static_cast<Element*>(args.y[c]) + t * args.width + d;
    for (int b = 0; b < kBlocks; ++b) {
      store(round_block(sums[c][b][0], sums[c][b][1]), row + b * kBlock,
            b + 1 < kBlocks ? kBlock : count);
    }
  }
}

template <int kWays>
void forward(const AggregateForward& args, int64_t begin, int64_t end, void* scratch) {
  constexpr int kBlocks = 2;
  auto** rows = static_cast<const Element**>(scratch);
  auto* weights = reinterpret_cast<uint32_t*>(rows + args.sources);
  for (int64_t t = begin; t < end; ++t) {
    load_weight_pairs<kWays>(args, t, weights);
    for (int64_t j = 0; j < args.sources; ++j) {
      rows[j] = static_cast<const Element*>(args.x[j]) + t * args.x_stride[j];
    }
    int64_t d = 0;
    for (; d + kBlocks * kBlock <= args.width; d += kBlocks * kBlock) {
      forward_strip<kWays, kBlocks>(args, rows, weights, t, d, kBlock);
    }
    for (; d < args.width; d += kBlock) {
      forward_strip<kWays, 1>(args, rows, weights, t, d, std::min(kBlock, args.width - d));
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// The gradients of the outputs of one token, a block after the other: the blocks of the kWays rows,
// then low and high of each pair of rows, an odd one paired with zeros.
template <int kWays>
struct Gradients {
  static constexpr int kPairs = (kWays + 1) / 2;
  static constexpr int kRegisters = kWays + 2 * kPairs;

  static inline void load_token(const AggregateBackward& args, int64_t t, __m512i* to) {
    for (int64_t d = 0; d < args.width; d += kBlock, to += kRegisters) {
      __m512i rows[2 * kPairs];
      for (int c = 0; c < 2 * kPairs; ++c) {
        rows[c] = _mm512_setzero_si512();
        if (c >= kWays || args.grad_outputs[c] == nullptr) continue;
        const Element* row =
            static_cast<const Element*>(args.grad_outputs[c]) + t * args.grad_output_stride[c];
        prefetch(row + d + args.grad_output_stride[c]);
        rows[c] = load(row + d, args.width - d);
      }
      for (int c = 0; c < kWays; ++c) to[c] = rows[c];
      for (int p = 0; p < kPairs; ++p) {
        to[kWays + 2 * p] = low(rows[2 * p], rows[2 * p + 1]);
        to[kWays + 2 * p + 1] = high(rows[2 * p], rows[2 * p + 1]);
      }
    }
  }
};

// Sources first..first+kSources-1 of token t.
template <int kWays, int kSources>
inline void backward_rows(const AggregateBackward& args, const __m512i* dy, int64_t t,
                          int64_t first) {
  using G = Gradients<kWays>;
  const Element* weights = static_cast<const Element*>(args.weights) + t * args.token_stride;
  const Element* x[kSources];
  const Element* incoming[kSources];
  Element* out[kSources];
  __m512i w[kSources][G::kPairs];
  __m512 dots[kSources][kWays];
  for (int s = 0; s < kSources; ++s) {
    const int64_t j = first + s;
    x[s] = static_cast<const Element*>(args.x[j]) + t * args.x_stride[j];
    incoming[s] = static_cast<const Element*>(args.grad_hiddens[j]);
    if (incoming[s] != nullptr) incoming[s] += t * args.grad_hidden_stride[j];
    out[s] = static_cast<Element*>(args.grad_x[j]) + t * args.width;
    for (int p = 0; p < G::kPairs; ++p) {
      const Element* pair = weights + 2 * p * args.way_stride + j * args.source_stride;
      w[s][p] = broadcast_pair(pair[0], 2 * p + 1 < kWays ? pair[args.way_stride] : Element{0});
    }
    for (auto& dot : dots[s]) dot = _mm512_setzero_ps();
  }
  for (int64_t d = 0; d < args.width; d += kBlock, dy += G::kRegisters) {
    const int64_t count = args.width - d;
    for (int s = 0; s < kSources; ++s) {
      prefetch(x[s] + d + args.x_stride[first + s]);
      const __m512bh values = pairs(load(x[s] + d, count));
      for (int c = 0; c < kWays; ++c) {
        dots[s][c] = _mm512_dpbf16_ps(dots[s][c], pairs(dy[c]), values);
      }
      __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      if (incoming[s] != nullptr) {
        prefetch(incoming[s] + d + args.grad_hidden_stride[first + s]);
        // A bfloat16 number is the upper half of the float32 number.
        const __m512i g = load(incoming[s] + d, count);
        sums[0] = _mm512_castsi512_ps(low(_mm512_setzero_si512(), g));
        sums[1] = _mm512_castsi512_ps(high(_mm512_setzero_si512(), g));
      }
      for (int p = 0; p < G::kPairs; ++p) {
        for (int h = 0; h < 2; ++h) {
          sums[h] = _mm512_dpbf16_ps(sums[h], pairs(dy[kWays + 2 * p + h]), pairs(w[s][p]));
        }
      }
      const __m512i dx = round_block(sums[0], sums[1]);
      if (args.past_caches) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out[s] + d), dx);
      } else {
        store(dx, out[s] + d, count);
      }
    }
  }
  Element* grad_weights = static_cast<Element*>(args.grad_weights) + t * kWays * args.sources;
  for (int s = 0; s < kSources; ++s) {
    for (int c = 0; c < kWays; ++c) {
      grad_weights[c * args.sources + first + s] = round_one(_mm512_reduce_add_ps(dots[s][c]));
    }
  }
}

template <int kWays>
void backward(const AggregateBackward& args, int64_t begin, int64_t end, void* scratch) {
  constexpr int kSources = 2;
  auto* dy = static_cast<__m512i*>(scratch);
  for (int64_t t = begin; t < end; ++t) {
    Gradients<kWays>::load_token(args, t, dy);
    int64_t j = 0;
    for (; j + kSources <= args.sources; j += kSources) {
      backward_rows<kWays, kSources>(args, dy, t, j);
    }
    for (; j < args.sources; ++j) backward_rows<kWays, 1>(args, dy, t, j);
  }
  if (args.past_caches) _mm_sfence();  // other threads read the gradients after this call
}

void forward_any(const AggregateForward& args, int64_t begin, int64_t end, void* scratch) {
  constexpr ForwardKernel kKernels[] = {forward<1>, forward<2>, forward<3>, forward<4>};
  const bool few = args.ways <= kMaxWays;
  const ForwardKernel kernel =
      few ? kKernels[args.ways - 1] : aggregate_kernels_avx512.forward[kBFloat16];
  kernel(args, begin, end, scratch);
}

void backward_any(const AggregateBackward& args, int64_t begin, int64_t end, void* scratch) {
  constexpr BackwardKernel kKernels[] = {backward<1>, backward<2>, backward<3>, backward<4>};
  const bool few = args.ways <= kMaxWays;
  const BackwardKernel kernel =
      few ? kKernels[args.ways - 1] : aggregate_kernels_avx512.backward[kBFloat16];
  kernel(args, begin, end, scratch);
}

}  // namespace

const ForwardKernel forward_bfloat16_avx512 = forward_any;
const BackwardKernel backward_bfloat16_avx512 = backward_any;

}  // namespace muddformer::cpu
