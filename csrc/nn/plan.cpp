#include "plan.h"

#include <algorithm>
#include <utility>

#include "checks.h"

namespace muddformer {

std::map<int64_t, std::vector<int64_t>> aggregation_plan(int64_t layers, int64_t source_stride,
                                                         int64_t block_stride,
                                                         std::optional<int64_t> window, bool last) {
  check_integer("layers", layers, kLargestInteger, 0);
  check_integer("source_stride", source_stride);
  check_integer("block_stride", block_stride);
  if (window) check_integer("window", *window);
  std::map<int64_t, std::vector<int64_t>> plan;
  for (int64_t i = 1; i <= layers; ++i) {
    if (!(i == layers ? last : i % block_stride == 0)) continue;
    const int64_t oldest = window ? i - *window + 1 : 0;
    std::vector<int64_t>& sources = plan[i];
    for (int64_t j = 0; j <= i; ++j) {
      if (j == 0 || j == i || (j % source_stride == 0 && j >= oldest)) sources.push_back(j);
    }
  }
  return plan;
}

std::vector<std::vector<int64_t>> flush_groups(const std::map<int64_t, std::vector<int64_t>>& plan,
                                               const std::map<int64_t, int64_t>& ways,
                                               std::optional<int64_t> interval) {
  std::vector<int64_t> order;
  for (const auto& [i, sources] : plan) {
    TORCH_CHECK_VALUE(!sources.empty(), "plan must have sources for aggregation ", i, ", got none");
    TORCH_CHECK_VALUE(interval || ways.contains(i), "ways must have a number for aggregation ", i,
                      " of plan, got none");
    order.push_back(i);
  }
  const auto count = static_cast<int64_t>(order.size());
  const auto group_of = [&](int64_t begin, int64_t end) {
    return std::vector<int64_t>(order.begin() + begin, order.begin() + end);
  };
  std::vector<std::vector<int64_t>> groups;
  if (interval) {
    check_integer("interval", *interval);
    for (int64_t end = count; end > 0; end -= *interval) {
      const int64_t begin = std::max<int64_t>(0, end - *interval);
      if (end - begin > 1) groups.insert(groups.begin(), group_of(begin, end));
    }
    return groups;
  }
  // For the first 0, 1, .. aggregations: units saved, and where the last group begins, or -1. A
  // unit is one pass over a [tokens, D]: each dX_j is read and written once and not by every
  // aggregation, of which the gradients of all sums are read and all but the residual way's
  // written.
  std::vector<std::pair<int64_t, int64_t>> best = {{0, -1}};
  for (int64_t end = 1; end <= count; ++end) {
    std::pair<int64_t, int64_t> choice = {best.back().first, -1};
    for (int64_t begin = 0; begin + 1 < end; ++begin) {
      const std::vector<int64_t>& first = plan.at(order[begin]);
      const auto old = static_cast<int64_t>(first.size()) - 1;
      int64_t saved = 2 * old * (end - begin - 1), factors = 0;
      bool common = true;
      for (const int64_t i : group_of(begin, end)) {
        const std::vector<int64_t>& sources = plan.at(i);
        common = common && static_cast<int64_t>(sources.size()) >= old &&
                 std::equal(first.begin(), first.begin() + old, sources.begin());
        factors += ways.at(i);
        saved -= 2 * ways.at(i) - 1;
      }
      const int64_t total = best[begin].first + saved;
      if (common && factors <= 16 && saved > 0 && total > choice.first) choice = {total, begin};
    }
    best.push_back(choice);
  }
  for (int64_t end = count; end > 0;) {
    const int64_t begin = best[end].second;
    if (begin >= 0) groups.insert(groups.begin(), group_of(begin, end));
    end = begin >= 0 ? begin : end - 1;
  }
  return groups;
}

}  // namespace muddformer
