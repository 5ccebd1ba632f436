"""Multiway Dynamic Dense (MUDD) connections for PyTorch (arXiv 2502.12170): fused operators, modules and models."""

from pkgutil import extend_path

# Started in the source folder, Python finds that folder first: the compiled part is in the installed package.
__path__ = extend_path(__path__, __name__)

from muddformer import _flops, _inductor, _onnx, _sharding, _tracing, nn, ops, utils  # noqa: F401  (_: they register)
from muddformer._library import __version__
from muddformer.inference import generate, generate_stream
from muddformer.models import MUDDFormer, MUDDFormerConfig, build_model, from_pretrained, save_pretrained

__all__ = [
    "MUDDFormer",
    "MUDDFormerConfig",
    "__version__",
    "build_model",
    "from_pretrained",
    "generate",
    "generate_stream",
    "nn",
    "ops",
    "save_pretrained",
    "utils",
]
