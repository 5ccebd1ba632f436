"""Inference: generation of tokens and text, and loading what it needs."""

from .generate import generate, generate_stream
from .sampling import sample

__all__ = ["generate", "generate_stream", "sample"]
