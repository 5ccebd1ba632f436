"""How likely a model finds given tokens, and the perplexity of texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_integer
from ..errors import InputError
from .tokenizer import first_token

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Passage", "TextScore", "cut_windows", "score", "score_texts"]


class Passage(NamedTuple):
    """Tokens whose likelihood is asked for.

    Attributes:
        ids: token ids, at most ``block_size + 1``.
        scored: how many of them, the last ones, are scored; at least one comes before them.
    """

    ids: Sequence[int]
    scored: int


@torch.no_grad()
def score(model: nn.Module, passages: Sequence[Passage], batch_size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """The likelihood of the last tokens of passages, each after those before it.

    Passages of a batch are padded behind, where no scored token sees it. So scores do not depend on ``batch_size``, but
    for the rounding of kernels that sum in another order.

    Args:
        model: a causal model of :func:`muddformer.build_model`.
        passages: the tokens.
        batch_size: passages that pass through the model at once. Ones of like length beside each other waste least.

    Returns:
        For each passage, in their order: the natural logarithms of the probabilities, float32 (float64 of a float64
        model) [scored] on the CPU, and whether each token is the likeliest one at its place, bool [scored].

    Raises:
        IndexError: for ids outside the vocabulary.
    """
    device = next(model.parameters()).device
    for begin in range(0, len(passages), batch_size):
        batch = passages[begin : begin + batch_size]
        longest = max(len(passage.ids) for passage in batch)
        rows = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, passage in zip(rows, batch, strict=True):
            row[: len(passage.ids)] = torch.tensor(passage.ids)
        rows = rows.to(device)
        logits = model(rows[:, :-1])
        for row, own, passage in zip(rows, logits, batch, strict=True):
            end = len(passage.ids)
            targets = row[end - passage.scored : end]
            own = own[end - passage.scored - 1 : end - 1].to(torch.promote_types(own.dtype, torch.float32))
            yield -F.cross_entropy(own, targets, reduction="none").cpu(), (own.argmax(-1) == targets).cpu()


def cut_windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Passage]:
    """Passages of at most ``window + 1`` tokens in which every token but the first is scored once.

    The first passage scores all that it can; each later one reads ``window`` tokens and scores the last ``stride``, or
    what is left.
    """
    done = min(window, len(ids) - 1)
    if done > 0:
        yield Passage(ids[: done + 1], done)
    while done < len(ids) - 1:
        scored = min(stride, len(ids) - 1 - done)
        done += scored
        yield Passage(ids[done - window : done + 1], scored)


@dataclasses.dataclass(frozen=True)
class TextScore:
    """The likelihood of a text.

    Attributes:
        name: of the text.
        tokens: number of tokens that were scored.
        bytes: length of the text in UTF-8.
        nats: minus the natural logarithm of its probability.
    """

    name: str
    tokens: int
    bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        """The mean loss. It depends on the tokenizer."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        """``exp(nats_per_token)``. It depends on the tokenizer."""
        return math.inf if self.nats_per_token > 700 else math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between models of different tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def to_dict(self) -> dict[str, str | int | float | None]:
        """All figures, ready for JSON; None where there is no finite one."""
        figures = {name: getattr(self, name) for name in ("nats_per_token", "perplexity", "bits_per_byte")}
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        return {**dataclasses.asdict(self), **finite}


def score_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[tuple[str, Iterable[str]]],
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TextScore]:
    """The likelihood of texts, each by itself, read in windows that overlap.

    Every token is scored once, with at least ``window - stride`` tokens before it once there are so many. The first one
    comes after the tokenizer's token for the beginning of a text (:func:`first_token`); without such a token it is not
    scored.

    Args:
        model: a causal model of :func:`muddformer.build_model`.
        tokenizer: its tokenizer.
        texts: names, and the texts in pieces that are tokenized one by one.
        window: tokens that the model reads at once, at most ``block_size``. None: ``block_size``.
        stride: tokens scored in each window but the first, at most ``window``. None: half of it.
        batch_size: windows at once.
        progress: called with the windows that are done and all of them.

    Raises:
        TypeError, ValueError: naming the argument.
        InputError: if the model is not causal.
    """
    config = model.config
    if not config.causal:
        raise InputError("the model is not causal: each of its tokens sees those that it should predict")
    window = config.block_size if window is None else check_integer("window", window, config.block_size)
    stride = max(1, window // 2) if stride is None else check_integer("stride", stride, window)
    check_integer("batch_size", batch_size)
    start = first_token(tokenizer)
    passages, owners, sizes = [], [], []
    for name, pieces in texts:
        ids, size = [] if start is None else [start], 0
        for piece in pieces:
            ids += tokenizer.encode(piece, add_special_tokens=False).ids
            size += len(piece.encode())
        own = list(cut_windows(ids, window, stride))
        passages += own
        owners += [len(sizes)] * len(own)
        sizes.append((name, size))
    nats, tokens = [0.0] * len(sizes), [0] * len(sizes)
    for done, (owner, (scores, _)) in enumerate(zip(owners, score(model, passages, batch_size), strict=True), 1):
        nats[owner] -= scores.double().sum().item()
        tokens[owner] += len(scores)
        progress(done, len(passages))
    return [TextScore(*sizes[i][:1], tokens[i], sizes[i][1], nats[i]) for i in range(len(sizes))]
