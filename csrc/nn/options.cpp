#include "options.h"

#include "checks.h"

namespace muddformer {

ConnectionOptions ConnectionOptions::checked() const {
  constexpr int64_t kLargest = int64_t{1} << 16;
  ConnectionOptions o = *this;
  check_integer("source_stride", o.source_stride, kLargest);
  check_integer("block_stride", o.block_stride, kLargest);
  if (o.window) check_integer("window", *o.window, kLargest);
  check_choice("post_norm", o.post_norm, {"none", "residual", "all"});
  if (o.cap) check_real("cap", *o.cap);
  check_choice("gelu_approximate", o.gelu_approximate, {"none", "tanh"});
  if (o.residual_dtype) {
    check_choice("residual_dtype", *o.residual_dtype, {"autocast", "float32"});
  }
  o.ways = check_ways(o.ways);
  TORCH_CHECK_VALUE(!o.dense || o.multiway || o.ways == kWays,
                    "ways must be 'qkvr' with multiway=false, got '", o.ways,
                    "': all streams share one aggregate");
  if (o.flush_interval) check_integer("flush_interval", *o.flush_interval, kLargest);
  TORCH_CHECK_VALUE(!o.window || o.flush_interval.value_or(1) == 1,
                    "flush_interval must be left out or 1 with a window, because the aggregations "
                    "of a group have to share their older hidden states, got flush_interval=",
                    o.flush_interval.value_or(1), " and window=", o.window.value_or(0));
  return o;
}

}  // namespace muddformer
