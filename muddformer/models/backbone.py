"""All of a language model but its head: embedding, blocks with MUDD connections, final norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import MUDDStack, RMSNorm
from .config import MUDDFormerConfig
from .layers import Block, RotaryEmbedding, make_norm

__all__ = ["Backbone"]


class Backbone(MUDDStack):
    """``X_0 = Embedding(ids)``, the blocks with MUDD connections (:class:`muddformer.nn.MUDDStack`), final norm.

    A subclass keeps as ``config`` something with ``vocab_size`` and ``initializer_range``, and defines ``forward``.
    Parameters have the names of the public release.

    Args:
        config: what the model computes.
        device, dtype: of the parameters.
    """

    config: Any

    def __init__(self, config: MUDDFormerConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        factory = {"device": device, "dtype": dtype}
        multiway = config.dense and config.multiway
        layers = [
            # Blocks that no aggregation stands before receive one stream and have one norm, as the first has.
            Block(config, i, multiway and config.separate_norms and i > 0 and i % config.block_stride == 0, **factory)
            for i in range(config.n_layer)
        ]
        MUDDStack.__init__(self, layers, config.dim, config, eps=config.norm_eps, multiway=multiway, **factory)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, **factory)
        self.rotary = RotaryEmbedding(config, device=device)
        self.norm = make_norm(config, **factory)
        self.register_load_state_dict_post_hook(_place_rotary_tables)

    def reset_parameters(self) -> None:
        """Gives all parameters their initial values: call it after ``to_empty`` of a model from the meta device.

        Matrices and embeddings ~ Normal(0, ``initializer_range``), biases 0, norms 1; connections as
        :class:`muddformer.nn.DepthAggregation` has it, so that a fresh model computes what its plain twin computes (but
        for a pre-norm without post-norm, and a cap of at most 1). The connections come last: a model and its plain twin
        draw equal values from equal seeds.
        """
        connections = {id(module) for module in self.dynamic_dense.modules()}
        for module in self.modules():
            if id(module) in connections:
                continue
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
        super().reset_parameters()

    def _embed(self, input_ids: Tensor) -> Tensor:
        try:
            return self.tok_embeddings(input_ids)
        except IndexError as error:
            raise IndexError(
                f"input_ids must be from 0 to vocab_size - 1 = {self.config.vocab_size - 1}, "
                f"got {input_ids.min().item()} to {input_ids.max().item()}"
            ) from error


def _place_rotary_tables(model: Backbone, _: Any) -> None:
    """The tables are not in a state dict: after ``load_state_dict(assign=True)`` on meta they follow the weights."""
    device = model.device
    if model.rotary.cos.device != device:
        model.rotary.reset_parameters(device)
