// Checks of sizes and alignment before a launch, shared by the launchers of the aggregation.
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>

#include "../common/launch.h"
#include "depth_aggregate.h"

namespace muddformer::kernels {

template <typename Args>
bool valid(const Args& p) {
  return p.tokens >= 0 && p.dim >= 1 && p.dim <= kMaxDim && p.sources >= 1 && p.ways >= 1 &&
         p.ways <= kMaxWays;
}

// Whether rows consist of aligned vectors of 16 bytes, in a dtype that the fast paths know.
template <typename Args>
bool has_vectors(const Args& p) {
  const int vector = p.dtype == DType::Float32 ? 4 : 8;
  if (p.dtype == DType::Float64 || p.dim % vector != 0) return false;
  const int64_t chunks = split_columns(static_cast<int>(p.dim / vector)).chunks;
  return p.tokens <= INT_MAX / chunks && aligned(p.x, p.sources) &&
         std::all_of(p.x_stride, p.x_stride + p.sources,
                     [=](int64_t stride) { return stride % vector == 0; });
}

}  // namespace muddformer::kernels
