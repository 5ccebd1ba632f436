"""Our models in lm-evaluation-harness (``pip install "muddformer[eval]"``).

``lm_eval.simple_evaluate(model=harness_model(model, tokenizer), tasks=[...])`` runs its tasks on our inference.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, require
from .generate import generate_stream
from .scoring import Passage, cut_windows, score
from .tokenizer import end_token, first_token

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from tokenizers import Tokenizer

    from ..models import Pretrained

__all__ = ["harness_model"]

_GENERATION = {"until", "do_sample", "temperature", "top_k", "top_p"}
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness_model(
    model: Pretrained, tokenizer: Tokenizer, *, batch_size: int = 8, max_new_tokens: int = 256, seed: int = 0
) -> TemplateLM:
    """A model as lm-evaluation-harness takes it, ``lm_eval.api.model.TemplateLM``.

    Args:
        model: a causal model of :func:`muddformer.build_model`.
        tokenizer: its tokenizer.
        batch_size: requests at once.
        max_new_tokens: longest continuation where a task does not say.
        seed: of tasks that sample.

    Raises:
        MissingPackage: without the package ``lm_eval``.
    """
    base = require("lm_eval.api.model", "eval").TemplateLM
    made = type("MUDDFormerLM", (_Harness, base), {"__doc__": _Harness.__doc__})()
    made.set_up(model, tokenizer, batch_size, max_new_tokens, seed)
    return made


class _Harness:
    """What a ``TemplateLM`` needs of a model: tokens, likelihoods, continuations."""

    def set_up(self, model: Pretrained, tokenizer: Tokenizer, batch_size: int, max_new_tokens: int, seed: int) -> None:
        """Takes the place of arguments of ``__init__``, which is the harness's."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_gen_toks = max_new_tokens
        self.seed = seed
        self._device = model.device

    @property
    def max_length(self) -> int:
        """The longest context."""
        return self.model.config.block_size

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return hashlib.sha256(self.tokenizer.to_str().encode()).hexdigest()

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return end_token(self.tokenizer)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context is."""
        token = first_token(self.tokenizer)
        if token is None:
            raise InputError("the tokenizer has no token that a text begins after, which this task needs")
        return token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text, without any that stand for its beginning."""
        return self.tokenizer.encode(string, add_special_tokens=bool(add_special_tokens)).ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passages = []
        for (_, text), context, continuation in requests:
            if len(continuation) > self.max_length:
                raise InputError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's block_size "
                    f"{self.max_length}: {text[:50]!r}"
                )
            passages.append(Passage((context + continuation)[-self.max_length - 1 :], len(continuation)))
        # The longest first: what does not fit into memory shows at once, and little is padded.
        order = sorted(range(len(passages)), key=lambda i: -len(passages[i].ids))
        scores = score(self.model, [passages[i] for i in order], self.batch_size)
        results: list[Any] = [None] * len(passages)
        for i, (logs, likeliest) in zip(order, scores, strict=True):
            results[i] = logs.double().sum().item(), bool(likeliest.all())
            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, read in windows that do not overlap, but for the last."""
        texts = [request.args[0] for request in requests]
        windows = [
            list(cut_windows([self.prefix_token_id, *self.tok_encode(text)], self.max_length, self.max_length))
            for text in texts
        ]
        scores = score(self.model, [passage for own in windows for passage in own], self.batch_size)
        results = [sum(logs.double().sum().item() for logs, _ in itertools.islice(scores, len(own))) for own in windows]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations that end before one of the texts in ``until``, or with the text."""
        results: list[str] = [""] * len(requests)
        prompts = []
        groups: dict[tuple[int, str], list[int]] = {}  # generate takes prompts of one length
        for i, request in enumerate(requests):
            context, options = request.args
            room = self.max_length - min(_longest(options, self.max_gen_toks), self.max_length - 1)
            prompts.append((self.tok_encode(context) or [self.prefix_token_id])[-room:])
            groups.setdefault((len(prompts[i]), json.dumps(options, sort_keys=True)), []).append(i)
        for (_, options), members in groups.items():
            for begin in range(0, len(members), self.batch_size):
                chosen = members[begin : begin + self.batch_size]
                texts = self._continue([prompts[i] for i in chosen], json.loads(options))
                for i, text in zip(chosen, texts, strict=True):
                    results[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return results

    def _continue(self, prompts: Sequence[Sequence[int]], options: dict[str, Any]) -> list[str]:
        ids = torch.tensor(prompts, device=self._device)
        count = min(_longest(options, self.max_gen_toks), self.max_length - ids.shape[1])
        steps = generate_stream(self.model, ids, max_new_tokens=count, seed=self.seed, **_sampling(options))
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        rows: list[list[int]] = [[] for _ in prompts]
        texts: list[str | None] = [None] * len(prompts)
        for step in steps:
            for n, token in enumerate(step[:, 0].tolist()):
                if texts[n] is None:
                    rows[n].append(token)
                    texts[n] = self._ended(rows[n], until)
            if None not in texts:
                break
        return [self.tok_decode(row) if text is None else text for row, text in zip(rows, texts, strict=True)]

    def _ended(self, row: Sequence[int], until: Sequence[str]) -> str | None:
        """The text of a continuation that has come to its end."""
        if row[-1] == self.eot_token_id:
            return self.tok_decode(row[:-1])
        text = self.tok_decode(row)
        ends = [text.index(end) for end in until if end and end in text]
        return text[: min(ends)] if ends else None


def _longest(options: dict[str, Any], default: int) -> int:
    return int(next((options[name] for name in _LENGTHS if options.get(name) is not None), default))


def _sampling(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of :func:`generate` that a task's ``generation_kwargs`` stand for."""
    if unknown := options.keys() - _GENERATION - set(_LENGTHS):
        raise InputError(f"generation_kwargs of a task cannot be followed here: {', '.join(sorted(unknown))}")
    temperature = float(options.get("temperature") or 0.0)
    sampled = options.get("do_sample")
    if sampled is None:
        sampled = temperature > 0
    if not sampled:
        return {}
    return {"temperature": temperature or 1.0, "top_k": options.get("top_k"), "top_p": options.get("top_p")}
