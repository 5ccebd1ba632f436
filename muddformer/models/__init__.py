"""Models with MUDD connections: configuration, layers, language model, cache, checkpoints and families."""

from .config import MUDDFormerConfig
from .families import FAMILIES, Family, build_model, family_of, from_pretrained, load_config, save_pretrained
from .kv_cache import KVCache
from .muddformer import MUDDFormer
from .pretrained import Pretrained, not_a_model

__all__ = [
    "FAMILIES",
    "Family",
    "KVCache",
    "MUDDFormer",
    "MUDDFormerConfig",
    "Pretrained",
    "build_model",
    "family_of",
    "from_pretrained",
    "load_config",
    "not_a_model",
    "save_pretrained",
]
