"""The cache of keys and values of earlier tokens.

The hidden states that MUDD connections mix belong to one token, so a decode step makes those of its own token anew and
needs nothing of earlier tokens but their keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_integer
from .config import MUDDFormerConfig

__all__ = ["KVCache"]


class KVCache:
    """Keys and values of all blocks, allocated once: [L, B, key/value heads, length, head width] each.

    Shapes do not depend on how many tokens are in the cache, and the next position is kept on the device. Give it to
    ``model(input_ids, cache=cache)``, first with the prompt, then with what follows. Without gradients only. Memory is
    taken with the first keys, and for as many heads as they have: in tensor parallelism those of one device.

    Args:
        config: the model's configuration.
        batch_size: number of sequences B.
        length: number of tokens that it holds, at most ``config.block_size``.
        device, dtype: of the model's parameters.

    Attributes:
        batch_size: number of sequences B.
        used: number of tokens that are in the cache.
    """

    keys: Tensor
    values: Tensor

    def __init__(
        self,
        config: MUDDFormerConfig,
        batch_size: int,
        length: int,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not config.causal:
            raise ValueError(
                "config must have causal=True, or later positions would see earlier ones change, got False"
            )
        self.batch_size = check_integer("batch_size", batch_size)
        check_integer("length", length, config.block_size)
        self._made_for = _shape(config)
        self._dtype = torch.get_default_dtype() if dtype is None else dtype
        self.used = self._reserved = 0
        with torch.inference_mode(False):  # what comes later may be without it
            self._next = torch.zeros(1, device=device, dtype=torch.int64)
            self._slots = torch.arange(length, device=device)
        self._positions = self._slots
        self._prompt = True

    def check_fits(self, config: MUDDFormerConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Checks that a model can use it.

        Args:
            config: the model's configuration.
            device, dtype: of the model's parameters.

        Raises:
            ValueError: if it has other blocks or heads, more places than the model has positions, or another device.
            TypeError: without autocast, if it has another dtype.
        """
        for name, value in _shape(config).items():
            if self._made_for[name] != value:
                raise ValueError(f"cache must be one of this model with {name}={value}, got {self._made_for[name]}")
        if len(self._slots) > config.block_size:
            raise ValueError(f"cache must hold at most block_size={config.block_size} tokens, got {len(self._slots)}")
        if self._slots.device != device:
            raise ValueError(f"cache must be on {device}, like the model, got {self._slots.device}")
        if self._dtype != dtype and not torch.is_autocast_enabled(device.type):
            raise TypeError(f"cache must be {dtype}, like the model, got {self._dtype}")

    def reserve(self, count: int) -> tuple[Tensor, Tensor | None]:
        """The places of the next ``count`` tokens, which are in the cache after :meth:`commit`.

        Returns:
            ``(positions, mask)``: their positions, int64 [count], and which slots of the cache they see, bool
            [count, length]; no mask for the first ones, which see each other causally.

        Raises:
            ValueError: if the cache is too short, or count less than 0.
            RuntimeError: if gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a KVCache works only without gradients: under torch.no_grad() or torch.inference_mode()"
            )
        if count < 0:
            raise ValueError(f"count must be 0 or more, got {count}")
        if self.used + count > len(self._slots):
            raise ValueError(
                f"input_ids has {count} tokens, but of the {len(self._slots)} places of the cache {self.used} are taken"
            )
        self._prompt = self.used == 0
        self._reserved = count
        self._positions = self._next + self._slots[:count]
        return self._positions, None if self._prompt else self._slots <= self._positions[:, None]

    def commit(self) -> None:
        """Keeps the tokens of the last :meth:`reserve`, when :meth:`update` has stored them for all blocks."""
        self.used += self._reserved
        self._next += self._reserved
        self._reserved = 0

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores keys and values [B, heads, count, head width] of one block; returns the ones to attend to."""
        if self._prompt and layer == 0:
            shape = (self._made_for["n_layer"], *k.shape[:2], len(self._slots), k.shape[3])
            with torch.inference_mode(False):
                self.keys = torch.zeros(shape, device=k.device, dtype=self._dtype)
                self.values = torch.zeros_like(self.keys)
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(2, self._positions, k.to(keys.dtype))
        values.index_copy_(2, self._positions, v.to(values.dtype))
        return (k, v) if self._prompt else (keys, values)


def _shape(config: MUDDFormerConfig) -> dict[str, int]:
    """What a model and its cache have in common."""
    return {"n_layer": config.n_layer, "n_kv_heads": config.n_kv_heads, "head_dim": config.head_dim}
