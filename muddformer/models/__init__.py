"""Language models with MUDD connections."""

from .muddformer import MUDDFormer, build_model

__all__ = ["MUDDFormer", "build_model"]
