"""Models spread over several devices, from outside: nothing else of the package imports this.

Data parallel training (DDP, FSDP) is PyTorch's and needs nothing of ours. The operators' rules for
torch.distributed.tensor are in ``muddformer/_sharding.py`` and are there as soon as that is imported.
"""

from .tensor_parallel import distribute_connections, tensor_parallel

__all__ = ["distribute_connections", "tensor_parallel"]
