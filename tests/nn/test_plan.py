"""Which hidden states are mixed, and whose gradients are added together."""

from __future__ import annotations

import pytest

from muddformer.nn import aggregation_plan, flush_groups


def test_plan() -> None:
    assert aggregation_plan(3) == {1: (0, 1), 2: (0, 1, 2), 3: (0, 1, 2, 3)}
    assert aggregation_plan(5, source_stride=2, block_stride=2) == {2: (0, 2), 4: (0, 2, 4), 5: (0, 2, 4, 5)}
    assert aggregation_plan(4, window=2) == {1: (0, 1), 2: (0, 1, 2), 3: (0, 2, 3), 4: (0, 3, 4)}
    assert aggregation_plan(4, window=1, last=False) == {1: (0, 1), 2: (0, 2), 3: (0, 3)}
    assert aggregation_plan(6, source_stride=2, window=3)[6] == (0, 4, 6)
    assert aggregation_plan(1) == {1: (0, 1)}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="layers must be from 0"):
        aggregation_plan(-1)
    with pytest.raises(TypeError, match="layers must be an integer, got '3'"):
        aggregation_plan("3")
    with pytest.raises(TypeError, match="last must be True or False, got None"):
        aggregation_plan(3, last=None)


def test_flush_groups() -> None:
    plan = aggregation_plan(12)
    ways = {i: 4 if i < 12 else 1 for i in plan}
    assert flush_groups(plan, ways) == [[6, 7, 8], [9, 10, 11, 12]]
    assert flush_groups(plan, ways, 5) == [[1, 2], [3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]
    assert flush_groups(plan, ways, 1) == []
    assert flush_groups(aggregation_plan(3), dict.fromkeys(range(1, 4), 4)) == []
    assert flush_groups({}, {}) == []
    # Older hidden states that drop out of a window are not common to a group.
    assert flush_groups(aggregation_plan(12, window=8), ways) == [[6, 7, 8]]
    assert flush_groups(aggregation_plan(12, window=3), ways) == []
    # The best groups are at least as good as any interval's.
    plan = aggregation_plan(24)
    ways = {i: 4 if i < 24 else 1 for i in plan}

    def saved(groups: list[list[int]]) -> int:
        return sum(2 * (len(plan[g[0]]) - 1) * (len(g) - 1) - sum(2 * ways[i] - 1 for i in g) for g in groups)

    assert all(saved(flush_groups(plan, ways)) >= saved(flush_groups(plan, ways, n)) for n in (2, 3, 4))
