"""Means over seeds and costs at equal loss."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence

__all__ = ["WIDEST", "cost_at_loss", "format_interval", "interval"]

# Student's t, two-sided 95 %, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# Costs that are more times apart are not joined: between them a curve that flattens runs far below a power law.
WIDEST = 2.5


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half of its 95 % confidence interval; None of a single value."""
    mean, count = statistics.fmean(values), len(values)
    if count == 1:
        return mean, None
    return mean, _T[min(count - 2, len(_T) - 1)] * statistics.stdev(values) / math.sqrt(count)


def format_interval(values: Sequence[float], digits: int) -> str:
    """As in "1.676 ± 0.004"; a dash without values."""
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def cost_at_loss(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """The cost at which a model reaches a loss, between two of its runs.

    Args:
        points: cost and final loss of runs of different budgets.
        loss: to reach. Between two budgets it is taken as a power of the cost.

    Returns:
        None where it would be extrapolated, or the costs on both sides are more than ``WIDEST`` times apart.
    """
    for (cost, above), (next_cost, below) in itertools.pairwise(sorted(points)):
        if below <= loss <= above and below < above and next_cost <= WIDEST * cost:
            share = math.log(above / loss) / math.log(above / below)
            return math.exp(math.log(cost) + share * (math.log(next_cost) - math.log(cost)))
    return None
