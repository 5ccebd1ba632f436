"""The language model of both families, with MUDD connections or without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..nn.norm import plain_parameters
from .backbone import Backbone
from .config import MUDDFormerConfig
from .kv_cache import KVCache
from .pretrained import Pretrained

__all__ = ["MUDDFormer"]


class MUDDFormer(Backbone, Pretrained):
    """MUDDFormer or MUDDPythia (``config.model_type``), or its plain twin (``config.dense=False``).

    ``X_0 = Embedding(ids)``, the blocks with MUDD connections (:class:`muddformer.nn.MUDDStack`), final norm, linear
    head. Parameters have the names of the public release. See :func:`muddformer.build_model` for the arguments.
    """

    config_class = MUDDFormerConfig

    def __init__(self, config: MUDDFormerConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        if not isinstance(config, MUDDFormerConfig):
            raise TypeError(f"config must be a MUDDFormerConfig, got {type(config).__name__}")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
        super().__init__(config, device=device, dtype=dtype)
        self.config = config
        self.output = None
        if not config.tie_word_embeddings:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None) -> Tensor:
        """Scores of the next token at every position, or their loss.

        Args:
            input_ids: token ids [B, T], int64 or int32, T at most ``config.block_size``.
            targets: the tokens to predict [B, T]; positions with -100 do not count.
            cache: of :meth:`new_cache`; ``input_ids`` follows the tokens that are in it, and is added.

        Returns:
            Logits [B, T, vocab_size]; with ``targets`` the mean cross-entropy instead, a float32 scalar (float64 for a
            float64 model).

        Raises:
            TypeError, ValueError: for a wrong dtype, shape, length or cache.
            RuntimeError: with a cache while gradients are enabled.
            IndexError: for a token id outside the vocabulary (on CUDA: torch's device-side assertion).
        """
        self._check_ids("input_ids", input_ids)
        if targets is not None:
            self._check_ids("targets", targets)
            if targets.shape != input_ids.shape:
                raise ValueError(
                    f"targets must have the shape of input_ids {list(input_ids.shape)}, got {list(targets.shape)}"
                )
        length = input_ids.shape[1]
        x = self._embed(input_ids)
        if cache is None:
            if length > self.config.block_size:
                raise ValueError(
                    f"input_ids must have at most block_size={self.config.block_size} tokens, got {length}"
                )
            blocks = {"rotary": self.rotary(length)}
        else:
            if not isinstance(cache, KVCache):
                raise TypeError(f"cache must be a KVCache, such as new_cache() makes, got {type(cache).__name__}")
            sequences = input_ids.shape[0]
            if sequences != cache.batch_size:
                raise ValueError(
                    f"input_ids must be {cache.batch_size} sequences, as many as the cache has, got {sequences}"
                )
            cache.check_fits(self.config, x.device, self.dtype)
            positions, mask = cache.reserve(length)
            blocks = {"rotary": self.rotary(length, positions), "mask": mask, "cache": cache}
        x = self.norm(super().forward(x, **blocks))
        y = self._logits(x) if targets is None else self._loss(x, targets)
        if cache is not None:
            cache.commit()  # nothing failed
        return y

    def plain_twin(self) -> MUDDFormer:
        """The plain Transformer with copies of this model's weights, without its connections.

        A fresh model and its twin compute the same: the connections then pass the newest hidden state on (but for a
        pre-norm without post-norm, and a cap of at most 1).

        Raises:
            ValueError: if the norms of q, k and v of a block differ: no plain Transformer has these weights.
        """
        twin = MUDDFormer(self.config.plain_twin(), device="meta").to_empty(device=self.device)
        twin = twin.to(self.dtype).train(self.training)
        state = {}
        for name, value in self.state_dict().items():
            block, separate, norm = name.partition(".attention_norms.")
            if separate:
                way, _, name = norm.partition(".")
                name = f"{block}.attention_norm.{name}"
                if way != "0" and not torch.equal(value, state[name]):
                    raise ValueError(f"{block}.attention_norms differ, so this model has no plain twin")
            state[name] = value
        expected = twin.state_dict().keys()
        twin.load_state_dict({name: value for name, value in state.items() if name in expected})
        return twin

    def new_cache(self, batch_size: int, length: int) -> KVCache:
        """An empty cache for ``batch_size`` sequences of at most ``length`` tokens, for :meth:`forward`."""
        return KVCache(self.config, batch_size, length, device=self.device, dtype=self.dtype)

    @classmethod
    def _check_count(cls, path: Path, config: MUDDFormerConfig, count: int) -> None:
        if count <= config.n_layer:
            raise ValueError(f"{path}: {count} tensors are too few for n_layer={config.n_layer}")

    def _stored_shapes(self, names: Mapping[str, Any]) -> dict[str, list[int]]:
        shapes = super()._stored_shapes(names)
        if self.config.tie_word_embeddings and "output.weight" in names:
            shapes["output.weight"] = shapes["tok_embeddings.weight"]
        return shapes

    def _check_stored(self, path: Path, state: dict[str, Tensor]) -> None:
        head = state.pop("output.weight", None) if self.config.tie_word_embeddings else None
        if head is not None and not torch.equal(head, state["tok_embeddings.weight"]):
            raise ValueError(
                f"{path}: output.weight differs from tok_embeddings.weight, but tie_word_embeddings is set"
            )

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.tok_embeddings.weight) if self.output is None else self.output(x)

    def _loss(self, x: Tensor, targets: Tensor) -> Tensor:
        head = self.tok_embeddings if self.output is None else self.output
        head = plain_parameters(head, x, nn.Embedding, nn.Linear)
        fused_by_compiler = torch.compiler.is_compiling() and type(x) is Tensor and not x.is_cuda
        if head is not None and not fused_by_compiler:
            return ops.linear_cross_entropy(x, head[0], targets, head[1])
        logits, targets = self._logits(x).flatten(0, 1), targets.flatten().long()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum") / (targets != -100).sum().clamp(min=1)

    def _check_ids(self, name: str, ids: Any) -> None:
        if not isinstance(ids, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(ids).__name__}")
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be int64 or int32, got {ids.dtype}")
        if ids.dim() != 2:
            raise ValueError(f"{name} must be [batch, tokens], got shape {list(ids.shape)}")
        weight = getattr(self.tok_embeddings, "weight", None)  # another module may have none, or a method of this name
        if isinstance(weight, Tensor) and ids.device != weight.device:
            raise ValueError(f"{name} must be on {weight.device}, like the model, got {ids.device}")
