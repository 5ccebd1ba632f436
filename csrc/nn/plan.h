// Which layers of a stack have an aggregation, of which hidden states, and which of them defer
// gradients together.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

#include "../macros.h"

namespace muddformer {

/// Which hidden states X_j each aggregation DA_i mixes: {i: {j, ...}}, i = 1 .. layers, j ascending
/// up to i.
///
/// @param layers number of blocks L.
/// @param source_stride k of "k x p": every k-th hidden state is a source, and always X_0 and X_i.
/// @param block_stride p of "k x p": an aggregation after every p-th block and after the last.
/// @param window of those, X_0 and the ones among the newest `window` hidden states; nullopt: all.
/// @param last false: none after the last block.
/// @throws c10::ValueError naming the argument, what was expected and what came.
MUDDFORMER_API std::map<int64_t, std::vector<int64_t>> aggregation_plan(
    int64_t layers, int64_t source_stride = 1, int64_t block_stride = 1,
    std::optional<int64_t> window = std::nullopt, bool last = true);

/// Which aggregations add to the gradients of older hidden states together (defer_gradients()).
///
/// @param plan the sources of each aggregation, see aggregation_plan().
/// @param ways number of ways C of each aggregation.
/// @param interval aggregations of a group, counted from the last one; nullopt: the groups that
///   move the fewest bytes, of at most 16 ways, what one pass of the CUDA kernel adds up.
/// @return groups of two or more successive aggregations, in order. The older hidden states of a
///   group are the sources of its first aggregation but the newest.
/// @throws c10::ValueError for an aggregation without sources or, where they count, ways.
MUDDFORMER_API std::vector<std::vector<int64_t>> flush_groups(
    const std::map<int64_t, std::vector<int64_t>>& plan, const std::map<int64_t, int64_t>& ways,
    std::optional<int64_t> interval = std::nullopt);

}  // namespace muddformer
