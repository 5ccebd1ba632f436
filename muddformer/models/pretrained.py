"""What models of every family have in common: files, device and dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

from .._checks import shown
from .checkpoint import CONFIG_NAME, check_tensors, open_weights, read_config, write_checkpoint

__all__ = ["Pretrained", "not_a_model"]

_WHOLE = "under FullyShardedDataParallel.summon_full_params(model, writeback=False), in the first process"


class Pretrained(nn.Module):
    """Base class of models that are saved as, and read from, a checkpoint directory.

    A subclass is made from its configuration alone, ``Model(config, device=..., dtype=...)``, and keeps it as
    ``config``.

    Attributes:
        config_class: the class of ``config``, with ``read(mapping)`` and ``to_dict()``.
        config: what the model computes.
    """

    config_class: ClassVar[type]
    config: Any

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return next(self.parameters()).dtype

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes the weights (``model.safetensors``) and the configuration (``config.json``) into a directory.

        The directory is made if it is not there. Each file appears under its name only when all of it is on the disk,
        so an interrupted save leaves the old file. A model that is sharded over processes (FSDP2) is gathered: all of
        them call this, the first one writes.

        Raises:
            ValueError: if the parameters are on the meta device.
            OSError: naming the file that cannot be written, on a full disk say; old files are then as they were.
        """
        # A block that torch.compile wraps is saved as the block.
        state = {name.replace("_orig_mod.", ""): value for name, value in self.state_dict().items()}
        self._check_saveable(state)
        if any(value.is_meta for value in state.values()):
            raise ValueError("model must have values to save, but its parameters are on the meta device")
        # A DTensor, by what it can do: its module takes long to import.
        sharded = any(hasattr(value, "full_tensor") for value in state.values())
        for name, value in state.items():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            state[name] = whole.detach().cpu().contiguous()
        try:
            if not sharded or torch.distributed.get_rank() == 0:
                write_checkpoint(Path(directory), state, self.config.to_dict())
        finally:
            if sharded:
                torch.distributed.barrier()  # whoever reads it next finds it there; nobody waits for one that failed

    def _check_saveable(self, state: Mapping[str, Any]) -> None:
        """Refuses a model whose parts were replaced: quantised, or with adapters that are not merged."""
        expected = self.skeleton(self.config).state_dict()
        for name, value in state.items():
            if name.endswith("_flat_param") or (name in expected and value.shape != expected[name].shape):
                raise ValueError(
                    f"model must be whole to be saved, but {name} has shape {list(value.shape)}: save a part of "
                    f"FullyShardedDataParallel {_WHOLE}"
                )
        for name in (*(state.keys() - expected.keys()), *(expected.keys() - state.keys())):
            raise ValueError(
                f"model must have the parts of its configuration to be saved, but {name} is "
                f"{'no part of it' if name in state else 'missing'}: merge adapters first, save a model before it is "
                "quantised"
            )
        for name, value in state.items():
            if type(value) not in (Tensor, nn.Parameter) and not hasattr(value, "full_tensor"):
                raise ValueError(
                    f"model must have ordinary tensors to be saved, but {name} is a {type(value).__name__}"
                )

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, device: Any = None, dtype: torch.dtype | None = None
    ) -> Self:
        """The model of a checkpoint directory, see :func:`muddformer.from_pretrained`."""
        return cls._load(Path(directory), read_config(Path(directory)), device, dtype)

    @classmethod
    def _load(cls, directory: Path, values: Mapping[str, Any], device: Any, dtype: torch.dtype | None) -> Self:
        """The model of a checkpoint directory whose ``config.json`` has been read."""
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
        config = cls._config_of(directory, values)
        with open_weights(directory) as (path, tensors):
            cls._check_count(path, config, len(tensors))
            model = cls.skeleton(config, directory / CONFIG_NAME)
            check_tensors(path, model._stored_shapes(tensors), tensors)
            # A copy: what is read may be a view of the mapped file.
            place = "cpu" if device is None else device  # 0 is a GPU
            state = {
                name: tensor.read().to(place, dtype, copy=True, memory_format=torch.contiguous_format)
                for name, tensor in tensors.items()
            }
        model._check_stored(path, state)
        model.load_state_dict(state, assign=True)
        return model

    @classmethod
    def skeleton(cls, config: Any, source: Any = "config") -> Self:
        """A model on the meta device.

        Args:
            config: its configuration.
            source: where that is from, for the message.

        Raises:
            ValueError: for sizes whose product overflows.
        """
        try:
            with _Unfilled():
                return cls(config, device="meta")
        except RuntimeError as error:
            raise ValueError(f"{source}: no model has these sizes: {error}") from error

    @classmethod
    def load_config(cls, directory: str | os.PathLike[str]) -> Any:
        """The configuration in a checkpoint directory.

        Raises:
            FileNotFoundError: if there is no ``config.json``.
            ValueError: naming the file and what is wrong with it.
        """
        return cls._config_of(Path(directory), read_config(Path(directory)))

    @classmethod
    def _config_of(cls, directory: Path, values: Mapping[str, Any]) -> Any:
        """The configuration that the contents of a directory's ``config.json`` stand for."""
        try:
            return cls.config_class.read(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{directory / CONFIG_NAME}: {shown(error, 500)}") from error

    @classmethod
    def _check_count(cls, path: Path, config: Any, count: int) -> None:
        """Refuses a number of tensors that cannot be this model's, before anything of a hostile size is built."""

    def _stored_shapes(self, names: Mapping[str, Any]) -> dict[str, list[int]]:
        """Shapes of the tensors that a file with these names must hold."""
        return {name: list(value.shape) for name, value in self.state_dict().items()}

    def _check_stored(self, path: Path, state: dict[str, Tensor]) -> None:
        """Checks values that must agree, and takes out of ``state`` what is stored but not loaded."""


class _Unfilled(TorchFunctionMode):
    """Draws no initial values, which on the meta device would do nothing but import torch's compiler, for seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)


def not_a_model(model: Any) -> TypeError:
    """The error for something that is no model of ours, which names the model inside if it is a wrapper of one."""
    inner = None
    if isinstance(model, nn.Module):
        inner = next((name for name, module in model.named_modules() if isinstance(module, Pretrained)), None)
    hint = f": pass the model inside, model.{inner}" if inner else ""
    if inner and "_fsdp_wrapped_module" in inner:
        hint += f", to save it {_WHOLE}"
    return TypeError(f"model must be a MUDDFormer, got {type(model).__name__}{hint}")
