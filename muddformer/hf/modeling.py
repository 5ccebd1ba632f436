"""The models for transformers: our own modules under its interfaces.

B, T: batch and sequence length; D: model width.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .. import ops
from ..models.backbone import Backbone
from ..models.layers import RotaryEmbedding
from ..nn import MUDDStack, RMSNorm
from ..nn.norm import plain_parameters
from .attention import CACHE, Attend, LayerCache, make_mask
from .configuration import MUDDFormerConfig, MUDDPythiaConfig
from .devices import check_device_map
from .files import check_directory, write_entry

__all__ = ["MUDDFormer", "MUDDFormerModel", "MUDDPythia", "MUDDPythiaModel"]


class PreTrained(PreTrainedModel):
    """What transformers asks of a model: flags, initial values, files."""

    config_class = MUDDFormerConfig
    base_model_prefix = ""  # the head stands beside the other parameters, as in the public release
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (as transformers declares it)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _input_embed_layer = "tok_embeddings"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """See transformers; a directory's files are checked first, and a model lies on one device.

        Raises:
            FileNotFoundError, ValueError: naming the file and what is wrong with it; for several devices.
        """
        check_device_map(kwargs.get("device_map"))
        check_directory(pretrained_model_name_or_path, kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        check_device_map(getattr(loaded[0] if isinstance(loaded, tuple) else loaded, "hf_device_map", None))
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """See transformers; a model card and the entry for ``trust_remote_code`` are written too."""
        push = kwargs.pop("push_to_hub", False)
        if kwargs.get("is_main_process", True):
            write_entry(save_directory, self)
        super().save_pretrained(save_directory, *args, push_to_hub=push, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing: every directory that is saved has the entry for ``trust_remote_code``."""


class MUDDFormerModel(Backbone, PreTrained):
    """Embedding, blocks and final norm."""

    _keys_to_ignore_on_load_unexpected = [r"^(output|lm_head)\.weight$"]  # noqa: RUF012  (of a directory with a head)

    def __init__(self, config: MUDDFormerConfig) -> None:
        PreTrained.__init__(self, config)
        self._build(config)
        self.post_init()

    def _build(self, config: MUDDFormerConfig) -> None:
        Backbone.__init__(self, config.to_model_config())
        for layer in self.layers:  # what attention functions of transformers, and of servers, read
            attention = layer.attention
            attention.config, attention.layer_idx, attention.is_causal = config, attention.index, config.causal
            attention.num_key_value_groups = config.n_head // config.n_local_heads

    def _init_weights(self, module: nn.Module) -> None:
        # transformers guards torch.nn.init while it calls this, so that what was loaded stays; and it calls it for
        # modules with parameters or buffers of their own alone.
        if module is self.dense_bs:
            for da, prior in zip(self.dynamic_dense, module, strict=True):
                if not getattr(prior, "_is_hf_initialized", False):
                    da.reset_prior(prior)
        elif isinstance(module, RMSNorm | nn.LayerNorm | RotaryEmbedding):
            module.reset_parameters()
        elif owner := next((da for da in self.dynamic_dense if any(module is part for part in da.children())), None):
            owner.reset_parameters()
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B, T, D].

        Args:
            input_ids: token ids [B, T].
            attention_mask: [B, tokens so far], 0 for padding on either side; or one that the attention function takes.
            position_ids: [B, T] or [1, T], each below ``block_size``: without a cache a row may hold
                several sequences behind each other, if the attention function keeps them apart. None: from the number
                of tokens in the cache on.
            past_key_values, cache: a cache of transformers, under either name.
            inputs_embeds: X_0 [B, T, D], in place of ``input_ids``.
            use_cache: make a cache if there is none. None: as the configuration says, not in training.
            kwargs: go to the attention function.

        Raises:
            ValueError: for both or none of ``input_ids`` and ``inputs_embeds``, a wrong shape, or too many tokens.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("one of input_ids and inputs_embeds must be given, not both and not none")
        if inputs_embeds is None and input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [batch, tokens], got shape {list(input_ids.shape)}")
        if inputs_embeds is not None and inputs_embeds.dim() != 3:
            raise ValueError(f"inputs_embeds must be [batch, tokens, dim], got shape {list(inputs_embeds.shape)}")
        x = self._embed(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if self.gradient_checkpointing and self.training:
            cache = None  # a block that is computed again would store its keys twice
        elif cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = DynamicCache(config=self.config)
        past = 0 if cache is None else cache.get_seq_length()
        self._check_length(past, x, cache, position_ids)
        places = past + torch.arange(x.shape[1], device=x.device)
        if position_ids is None:
            position_ids = places.unsqueeze(0)
        mask = make_mask(self.config, x, attention_mask, cache, position_ids, places)
        want_weights = self._wants("output_attentions", kwargs)
        attend = Attend(self.config._attn_implementation, {"position_ids": position_ids, **kwargs}, want_weights)
        hiddens = [x] if self._wants("output_hidden_states", kwargs) else None
        with ExitStack() as stack:
            if hiddens is not None:
                for layer in self.layers[:-1]:
                    hook = layer.register_forward_hook(lambda module, args, y: hiddens.append(y))
                    stack.callback(hook.remove)
            rotary = self.rotary(x.shape[1], position_ids)
            layers_cache = None if cache is None else LayerCache(cache, places)
            x = MUDDStack.forward(self, x, rotary=rotary, mask=mask, cache=layers_cache, attend=attend)
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            hidden_states=None if hiddens is None else (*hiddens, x),
            attentions=tuple(attend.weights) if want_weights else None,
            **{CACHE: cache},
        )

    def _check_length(self, past: Any, x: Tensor, cache: Any, position_ids: Tensor | None) -> None:
        most = self.config.block_size
        if position_ids is None or cache is not None:
            if isinstance(past, int) and past + x.shape[1] > most:
                raise ValueError(f"a sequence must have at most block_size={most} tokens, got {past + x.shape[1]}")
        # Elsewhere than on a CPU the values cost a wait: only for more tokens than one sequence has.
        elif (
            not torch.compiler.is_compiling()
            and (x.device.type == "cpu" or x.shape[1] > most)
            and (position_ids >= most).any()
        ):
            raise ValueError(f"position_ids must be below block_size={most}, got {int(position_ids.max())}")

    def _wants(self, name: str, kwargs: dict[str, Any]) -> bool:
        """Whether a call, or else the configuration, asks for an output."""
        asked = kwargs.pop(name, None)
        return bool(getattr(self.config, name, False) if asked is None else asked)


class MUDDFormer(MUDDFormerModel, GenerationMixin):
    """The language model, with the name that it has in the public release."""

    _keys_to_ignore_on_load_unexpected = None
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}  # noqa: RUF012
    _tp_plan = {"output": "colwise_rep"}  # noqa: RUF012
    _fsdp_plan = {"output": "keep_full_weight"}  # noqa: RUF012

    def _build(self, config: MUDDFormerConfig) -> None:
        super()._build(config)
        self.loss_type = "ForCausalLM"
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the head."""
        self.output = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Any = None,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Scores of the next token, and their loss.

        Args:
            labels: the input ids [B, T], -100 where they do not count: position t is to predict ``labels[:, t + 1]``.
            logits_to_keep: of so many last positions, or of these positions; 0: of all.
            skip_logits: with ``labels``: make the loss without the logits of all tokens in memory, and return none.
                None: in training, if the configuration says so.
            others: see :meth:`MUDDFormerModel.forward`; ``num_items_in_batch`` is what the sum of the losses is
                divided by, the number of labels that count by default.
        """
        loss_names = ("num_items_in_batch", "ignore_index", "shift_labels")
        loss_kwargs = {name: kwargs.pop(name) for name in loss_names if name in kwargs}
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cache=cache,
            **{**kwargs, "return_dict": True},
        )
        x = outputs.last_hidden_state
        logits = loss = None
        if skip_logits is None:
            skip_logits = self.config.skip_logits and self.training
        head = plain_parameters(self.output, x, nn.Linear)
        own_loss = not hasattr(self, "_loss_function")
        if labels is not None and skip_logits and head is not None and own_loss:
            loss = causal_loss(x, head, labels, **loss_kwargs)
        else:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.output(x[:, keep])
            if labels is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


class MUDDPythiaModel(MUDDFormerModel):
    """Embedding, blocks and final norm of a MUDDPythia."""

    config_class = MUDDPythiaConfig


class MUDDPythia(MUDDFormer):
    """The language model of a MUDDPythia."""

    config_class = MUDDPythiaConfig


def causal_loss(
    x: Tensor,
    head: tuple[Tensor, Tensor | None],
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
) -> Tensor:
    """The cross-entropy of the next tokens without their logits, as transformers' ForCausalLMLoss counts it.

    Args:
        x: hidden states [B, T, D].
        head: weight [V, D] and bias of the head.
        labels: [B, T]; ``shift_labels`` are those that each position is to predict, if they are known.
        num_items_in_batch: divides the sum. None: the number of labels that count.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    targets = shift_labels.to(x.device).contiguous()
    loss = ops.linear_cross_entropy(x, head[0], targets, head[1], reduction=reduction, ignore_index=ignore_index)
    if num_items_in_batch is None:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch)


for config, base, causal_lm in (
    (MUDDFormerConfig, MUDDFormerModel, MUDDFormer),
    (MUDDPythiaConfig, MUDDPythiaModel, MUDDPythia),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, base, exist_ok=True)
    AutoModelForCausalLM.register(config, causal_lm, exist_ok=True)
    # vLLM gives the base model a head of its own and looks for the weight under this name.
    head = [WeightRenaming("output.weight", "lm_head.weight")]
    register_checkpoint_conversion_mapping(base.__name__, head, overwrite=True)
