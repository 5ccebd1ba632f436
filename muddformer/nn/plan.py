"""Which hidden states each aggregation mixes, and which aggregations add to their gradients together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .._checks import check_flag, check_integer

__all__ = ["aggregation_plan", "flush_groups"]


def aggregation_plan(
    layers: int, *, source_stride: int = 1, block_stride: int = 1, window: int | None = None, last: bool = True
) -> dict[int, tuple[int, ...]]:
    """Which hidden states X_j each aggregation DA_i mixes: ``{i: (j, ...)}``, i = 1 .. layers, j ascending up to i.

    Args:
        layers: number of blocks L, at least 0.
        source_stride: k of "k x p": every k-th hidden state is a source, and always X_0 and X_i.
        block_stride: p of "k x p": an aggregation after every p-th block and after the last.
        window: of those, X_0 and the ones among the newest ``window`` hidden states. None: all.
        last: False: none after the last block.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    layers = check_integer("layers", layers, low=0)
    check_flag("last", last)
    check_integer("source_stride", source_stride)
    check_integer("block_stride", block_stride)
    if window is not None:
        check_integer("window", window)
    oldest = {i: 0 if window is None else i - window + 1 for i in range(1, layers + 1)}
    return {
        i: tuple(j for j in range(i + 1) if j in (0, i) or (j % source_stride == 0 and j >= oldest[i]))
        for i in range(1, layers + 1)
        if (last if i == layers else i % block_stride == 0)
    }


def flush_groups(
    plan: Mapping[int, Sequence[int]], ways: Mapping[int, int], interval: int | None = None
) -> list[list[int]]:
    """Which aggregations add to the gradients of older hidden states together (:func:`muddformer.ops.defer_gradients`).

    Args:
        plan: the sources of each aggregation, see :func:`aggregation_plan`.
        ways: number of ways C of each aggregation.
        interval: aggregations of a group, counted from the last one, of a plan without a window. None: the groups that
            move the fewest bytes, of at most 16 ways, what one pass of the CUDA kernel adds up.

    Returns:
        Groups of two or more successive aggregations, in order. The older hidden states of a group are the sources of
        its first aggregation but the newest.
    """
    order = list(plan)
    if interval is not None:
        check_integer("interval", interval)
        groups = [order[max(0, end - interval) : end] for end in range(len(order), 0, -interval)]
        return [group for group in reversed(groups) if len(group) > 1]
    best: list[tuple[int, list[list[int]]]] = [(0, [])]  # for the first 0, 1, .. aggregations: units saved, groups
    for end in range(1, len(order) + 1):
        choice = best[end - 1]
        for begin in range(end - 1):
            group = order[begin:end]
            old = plan[group[0]][:-1]
            if sum(ways[i] for i in group) > 16 or any(plan[i][: len(old)] != old for i in group):
                continue
            # A unit is one pass over a [tokens, D]: each dX_j is read and written once instead of len(group) times, and
            # of every aggregation the gradients of its sums are read, and all but the residual way's are written.
            saved = 2 * len(old) * (len(group) - 1) - sum(2 * ways[i] - 1 for i in group)
            if saved > 0 and best[begin][0] + saved > choice[0]:
                choice = (best[begin][0] + saved, [*best[begin][1], group])
        best.append(choice)
    return best[-1][1]
