// Rows of any dtype as vectors of the type that their sums are in. For CPU kernels alone, which are
// compiled once for each instruction set: what is here is another function in each of them.
#pragma once

#include <ATen/cpu/vec/functional.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace muddformer::cpu {
inline namespace CPU_CAPABILITY {

template <typename scalar_t>
using accumulate_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// kVectors vectors of the accumulation type hold as many elements as one vector of scalar_t, a
// pack: a whole one, or the `count` elements that are left of a row.
template <typename scalar_t>
struct Pack {
  using Vec = at::vec::Vectorized<accumulate_t<scalar_t>>;
  static constexpr bool kReduced = !std::is_same_v<scalar_t, accumulate_t<scalar_t>>;
  static constexpr int kVectors = kReduced ? 2 : 1;
  static constexpr int kElements = at::vec::Vectorized<scalar_t>::size();

  template <bool kWhole>
  static inline void load(const scalar_t* from, int64_t count, Vec* to) {
    const auto loaded = kWhole ? at::vec::Vectorized<scalar_t>::loadu(from)
                               : at::vec::Vectorized<scalar_t>::loadu(from, count);
    if constexpr (kReduced) {
      std::tie(to[0], to[1]) = at::vec::convert_to_float<scalar_t>(loaded);
    } else {
      to[0] = loaded;
    }
  }

  static inline at::vec::Vectorized<scalar_t> pack(const Vec* from) {
    if constexpr (kReduced) {
      return at::vec::convert_from_float<scalar_t>(from[0], from[1]);
    } else {
      return from[0];
    }
  }

  template <bool kWhole>
  static inline void store(const Vec* from, scalar_t* to, int64_t count) {
    const at::vec::Vectorized<scalar_t> packed = pack(from);
    if constexpr (kWhole) {
      packed.store(to);
    } else {
      packed.store(to, count);
    }
  }
};

// Calls f(whole, d, count) for every pack of a row, whole being a constant: d is its first element.
template <typename P, typename F>
inline void for_each_pack(int64_t width, const F& f) {
  int64_t d = 0;
  for (; d + P::kElements <= width; d += P::kElements) f(std::true_type(), d, P::kElements);
  if (d < width) f(std::false_type(), d, width - d);
}

}  // namespace CPU_CAPABILITY
}  // namespace muddformer::cpu
