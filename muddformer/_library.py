"""Loads libmuddformer, whose static initialisers register the operators of ``torch.ops.muddformer``."""

from pathlib import Path

import torch

try:
    from muddformer import _C
except ImportError as error:
    raise ImportError(
        f"muddformer: the compiled module muddformer._C is missing or made for another Python ({error}). Build it with "
        "`pip install --no-build-isolation .` in the source folder."
    ) from error


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


if _minor(torch.__version__) != _minor(_C.torch_version):
    raise ImportError(
        f"muddformer {_C.version} was built for torch {_minor(_C.torch_version)}, but torch {torch.__version__} is "
        "installed: rebuild it with `pip install --no-build-isolation --force-reinstall --no-deps .`"
    )

__version__: str = _C.version

try:
    torch.ops.load_library(str(Path(_C.__file__).parent / "lib" / "libmuddformer.so"))
except OSError as error:
    raise ImportError(
        f"muddformer: libmuddformer cannot be loaded into torch {torch.__version__}: {error.__cause__ or error}. Was "
        "it built with another torch? `pip install --no-build-isolation --force-reinstall --no-deps .` builds it again."
    ) from error
