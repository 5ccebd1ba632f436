"""The operations of Multiway Dynamic Dense (MUDD) connections (arXiv 2502.12170, section 2).

B, T: batch and sequence length (any leading shape); D: model width; S: number of sources; C: number of ways;
K: hidden width of the generator. Dtypes: float64, float32, bfloat16, float16. Products and sums are accumulated in
float32 (float64 for float64). Under autocast tensors are taken, and results are, in the autocast dtype, where nothing
else is said. The kernels are in ``csrc/ops``; here are only the Python signatures of
``torch.ops.muddformer.*``, a file an operator.

On the CPU, memory of freed results is kept for results of the same size, which saves the page faults of fresh memory.
The environment variable ``MUDDFORMER_CPU_CACHE_MIB``, read at the first use, is the most of it that is kept, in MiB
(256 where it is not set, at most 2^20; 0 keeps nothing). What is unused for five seconds goes back to the system.
"""

from .. import _library  # noqa: F401  (loads libmuddformer, which registers the operators)
from .add_norm import add_norm
from .connection_weights import connection_weights, connection_weights_chained
from .defer_gradients import Deferral, defer_gradients
from .depth_aggregate import depth_aggregate, depth_aggregate_chained
from .depth_aggregate_norm import StreamNorms, depth_aggregate_norm_chained, fuses_norms
from .depth_aggregation_step import depth_aggregation_step, fuses_step
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .qk_norm_rotary import qk_norm_rotary
from .swiglu import swiglu

__all__ = [
    "Deferral",
    "StreamNorms",
    "add_norm",
    "connection_weights",
    "connection_weights_chained",
    "defer_gradients",
    "depth_aggregate",
    "depth_aggregate_chained",
    "depth_aggregate_norm_chained",
    "depth_aggregation_step",
    "fuses_norms",
    "fuses_step",
    "linear",
    "linear_cross_entropy",
    "qk_norm_rotary",
    "swiglu",
]
