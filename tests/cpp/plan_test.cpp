#include <c10/util/Exception.h>
#include <gtest/gtest.h>
#include <muddformer/nn/plan.h>

#include <limits>

namespace muddformer {
namespace {

TEST(AggregationPlan, IsThatOfThePaper) {
  using Plan = std::map<int64_t, std::vector<int64_t>>;
  EXPECT_EQ(aggregation_plan(3), (Plan{{1, {0, 1}}, {2, {0, 1, 2}}, {3, {0, 1, 2, 3}}}));
  EXPECT_EQ(aggregation_plan(5, 2, 2), (Plan{{2, {0, 2}}, {4, {0, 2, 4}}, {5, {0, 2, 4, 5}}}));
  EXPECT_EQ(aggregation_plan(4, 1, 1, 2),
            (Plan{{1, {0, 1}}, {2, {0, 1, 2}}, {3, {0, 2, 3}}, {4, {0, 3, 4}}}));
  EXPECT_EQ(aggregation_plan(4, 1, 1, 1, false), (Plan{{1, {0, 1}}, {2, {0, 2}}, {3, {0, 3}}}));
  EXPECT_THROW(aggregation_plan(-1), c10::ValueError);
  EXPECT_THROW(aggregation_plan(std::numeric_limits<int64_t>::max()), c10::ValueError);
}

// The same as Python's, tests/nn/test_plan.py.
TEST(FlushGroups, AreThoseOfPython) {
  using Groups = std::vector<std::vector<int64_t>>;
  const auto groups = [](int64_t layers, std::optional<int64_t> window,
                         std::optional<int64_t> interval) {
    const auto plan = aggregation_plan(layers, 1, 1, window);
    std::map<int64_t, int64_t> ways;
    for (const auto& [i, sources] : plan) ways[i] = i < layers ? 4 : 1;
    return flush_groups(plan, ways, interval);
  };
  EXPECT_EQ(groups(12, {}, {}), (Groups{{6, 7, 8}, {9, 10, 11, 12}}));
  EXPECT_EQ(groups(12, {}, 5), (Groups{{1, 2}, {3, 4, 5, 6, 7}, {8, 9, 10, 11, 12}}));
  EXPECT_EQ(groups(12, {}, 1), Groups{});
  EXPECT_EQ(groups(3, {}, {}), Groups{});
  EXPECT_EQ(groups(12, 8, {}), (Groups{{6, 7, 8}}));
  EXPECT_EQ(groups(12, 3, {}), Groups{});
  EXPECT_EQ(
      groups(24, {}, {}),
      (Groups{{6, 7, 8}, {9, 10, 11, 12}, {13, 14, 15, 16}, {17, 18, 19, 20}, {21, 22, 23, 24}}));
  EXPECT_THROW(groups(12, {}, 0), c10::ValueError);
}

TEST(FlushGroups, RefusesWhatIsNoPlan) {
  EXPECT_THROW(flush_groups({{1, {}}, {2, {}}}, {{1, 4}, {2, 4}}), c10::ValueError);
  EXPECT_THROW(flush_groups(aggregation_plan(3), {{1, 4}, {2, 4}}), c10::ValueError);
  EXPECT_EQ(flush_groups(aggregation_plan(3), {}, 2).size(), 1u);
}

}  // namespace
}  // namespace muddformer
