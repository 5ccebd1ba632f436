"""MUDD connections in transformers (``pip install muddformer[hf]``)."""

from .attach import attach, load_attached

__all__ = ["attach", "load_attached"]
