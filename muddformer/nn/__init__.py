"""Modules that give a stack of blocks Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170).

:class:`MUDDStack` runs blocks with a layer of connections after each of them, :class:`Connections` has the connections
alone, :class:`DepthAggregation` is one layer of them.

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways.
"""

from .connections import BlockHistory, Connections, History
from .depth_aggregation import DepthAggregation
from .norm import RMSNorm
from .options import ConnectionOptions
from .plan import aggregation_plan, flush_groups
from .stack import MUDDStack

__all__ = [
    "BlockHistory",
    "ConnectionOptions",
    "Connections",
    "DepthAggregation",
    "History",
    "MUDDStack",
    "RMSNorm",
    "aggregation_plan",
    "flush_groups",
]
