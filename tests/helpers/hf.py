"""Small models for transformers."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import muddformer
import muddformer.hf
from helpers.models import make, scramble


def twin(model: muddformer.MUDDFormer, **changes: object) -> PreTrainedModel:
    """The class for transformers with a model's weights."""
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model.config.to_dict(), **changes))
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        state["output.weight"] = state["tok_embeddings.weight"]
    other.load_state_dict(state)
    return other.train(model.training)


def small(variant: str = "default", **changes: object) -> PreTrainedModel:
    """A model whose parameters all count, in eval mode."""
    torch.manual_seed(0)
    return twin(scramble(make(variant, **changes)).eval())


def tiny_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    """Words of one letter."""
    words = ["<unk>", "<pad>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", padding_side="left", **special)
