"""MUDDFormers, and MUDD connections for other models, in transformers (``pip install muddformer[hf]``).

Importing this registers the models with transformers' auto classes.
"""

from ..errors import require

require("transformers", "hf")

from .attach import attach, load_attached  # noqa: E402
from .configuration import MUDDFormerConfig, MUDDPythiaConfig  # noqa: E402
from .modeling import MUDDFormer, MUDDFormerModel, MUDDPythia, MUDDPythiaModel  # noqa: E402

__all__ = [
    "MUDDFormer",
    "MUDDFormerConfig",
    "MUDDFormerModel",
    "MUDDPythia",
    "MUDDPythiaConfig",
    "MUDDPythiaModel",
    "attach",
    "load_attached",
]
