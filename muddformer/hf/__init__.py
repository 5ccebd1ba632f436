"""MUDD connections in transformers (``pip install muddformer[hf]``)."""

from ..errors import require

require("transformers", "hf")

from .attach import attach, load_attached  # noqa: E402

__all__ = ["attach", "load_attached"]
