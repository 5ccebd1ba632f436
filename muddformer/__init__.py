"""Multiway Dynamic Dense (MUDD) connections for PyTorch (arXiv 2502.12170): fused operators, modules and models."""

from muddformer import _library  # noqa: F401  (loads libmuddformer; before everything that uses its ops)
from muddformer import ops
from muddformer._library import __version__

__all__ = ["__version__", "ops"]
