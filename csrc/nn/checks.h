// Checks of values, shared by the configuration, the modules and the generation. An error names the
// value, what was expected and what came, in the words of the Python package.
#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

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

inline void check_choice(const char* name, std::string_view value,
                         std::initializer_list<std::string_view> choices) {
  std::string listed;
  for (const std::string_view choice : choices) {
    if (choice == value) return;
    listed.append(listed.empty() ? "'" : ", '").append(choice).append("'");
  }
  TORCH_CHECK_VALUE(false, name, " must be one of ", listed, ", got '", value, "'");
}

inline void check_post_norm(std::string_view value) {
  check_choice("post_norm", value, {"none", "residual", "all"});
}

inline void check_gelu_approximate(std::string_view value) {
  check_choice("gelu_approximate", value, {"none", "tanh"});
}

// Refuses groups of aggregations that do not share their older hidden states.
inline void check_flush_interval(std::optional<int64_t> interval, std::optional<int64_t> window) {
  if (interval) check_integer("flush_interval", *interval, 1 << 16);
  TORCH_CHECK_VALUE(!window || interval.value_or(1) == 1,
                    "flush_interval must be left out or 1 with a window, because the aggregations "
                    "of a group have to share their older hidden states, got flush_interval=",
                    interval.value_or(1), " and window=", window.value_or(0));
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
