// Checks of values, shared by modules, models and generation. An error names the value, what was
// expected and what came, in the words of the Python package.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "../ops/common/checks.h"

namespace muddformer {

inline constexpr std::string_view kWays = "qkvr";
inline constexpr int64_t kLargestInteger = (int64_t{1} << 31) - 1;

inline void check_integer(const char* name, int64_t value, int64_t high = kLargestInteger,
                          int64_t low = 1) {
  TORCH_CHECK_VALUE(low <= value && value <= high, name, " must be from ", low, " to ", high,
                    ", got ", value);
}

// Finite, more than `low` and at most `high`.
inline void check_real(const char* name, double value, double low = 0.0,
                       double high = std::numeric_limits<double>::infinity()) {
  const bool right = std::isfinite(value) && low < value && value <= high;
  if (std::isfinite(high)) {
    TORCH_CHECK_VALUE(right, name, " must be more than ", low, " and at most ", high, ", got ",
                      value);
  }
  TORCH_CHECK_VALUE(right, name, " must be more than ", low, " and finite, got ", value);
}

// A dtype of the models: what parameters are made in.
inline void check_dtype(const char* name, const at::TensorOptions& options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  TORCH_CHECK_TYPE(detail::is_floating(dtype), name,
                   " must have dtype float64, float32, bfloat16 or float16, got ", dtype);
}

inline void check_choice(const char* name, std::string_view value,
                         const std::vector<std::string_view>& choices) {
  std::string listed;
  for (const std::string_view choice : choices) {
    if (choice == value) return;
    listed.append(listed.empty() ? "'" : ", '").append(choice).append("'");
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", listed, ", got '", value, "'");
}

// `ways` in the order of "qkvr", after checking that it is a part of it, not empty, no letter
// twice.
inline std::string check_ways(const std::string& ways) {
  std::string ordered;
  for (const char way : kWays) {
    if (ways.find(way) != std::string::npos) ordered += way;
  }
  TORCH_CHECK_VALUE(!ways.empty() && ordered.size() == ways.size(),
                    "ways must be a part of 'qkvr', not empty and no letter twice, got '", ways,
                    "'");
  return ordered;
}

}  // namespace muddformer
