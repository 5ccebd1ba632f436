"""Modules that give a stack of blocks Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170).

:class:`DepthAggregation` is one layer of connections, :class:`MUDDStack` runs blocks with one after each of them.

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways.
"""

from .depth_aggregation import DepthAggregation
from .norm import RMSNorm
from .plan import aggregation_plan, flush_groups
from .stack import MUDDStack

__all__ = ["DepthAggregation", "MUDDStack", "RMSNorm", "aggregation_plan", "flush_groups"]
