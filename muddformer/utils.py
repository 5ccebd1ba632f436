"""What the installed package was built with, and where C++ projects find it."""

from pathlib import Path

import torch

from muddformer import _C

__all__ = ["build_info", "cmake_prefix_path"]

cmake_prefix_path: str = str(Path(_C.__file__).parent / "share" / "cmake")
"""Folder for CMAKE_PREFIX_PATH, so that ``find_package(muddformer)`` works; as ``torch.utils.cmake_prefix_path``."""


def build_info() -> dict[str, str]:
    """Versions of muddformer, of what it was built with and of what it runs on."""
    kernels = f"CUDA {_C.cuda_version} for {_C.cuda_architectures}" if _C.cuda_version else "none (CPU build)"
    return {
        "muddformer": _C.version,
        "built for torch": _C.torch_version,
        "CUDA kernels": kernels,
        "torch": torch.__version__,
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
    }
