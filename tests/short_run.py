"""Short training runs on real text, the Python standard library byte by byte: fast operators beside naive ones."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from muddformer import MUDDFormerConfig, build_model
from muddformer.nn.naive import naive_connections
from muddformer.training.corpus import find_documents
from muddformer.training.optim import parameter_groups


def text_bytes(count: int) -> Tensor:
    """The first bytes of the standard library's source, int64 [count]."""
    data = bytearray()
    for document in find_documents(()):
        for chunk in document.chunks():
            data += chunk
        if len(data) >= count:
            break
    return torch.frombuffer(data[:count], dtype=torch.uint8).long()


def training_losses(
    config: MUDDFormerConfig,
    *,
    steps: int,
    seed: int,
    naive: bool,
    batch: int = 8,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
) -> list[float]:
    """The loss of every step of a run that sees the same text in the same order whatever its other arguments.

    Args:
        config: of the model, over bytes.
        seed: of the initial values.
        naive: connections in plain PyTorch (tests/reference.py), their gradients added up by autograd.
        autocast: dtype to run under autocast; None: float32.
    """
    text = text_bytes(1 << 20)
    starts = torch.randint(len(text) - config.block_size, (steps, batch), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(seed)
    model = build_model(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-3, (0.9, 0.95))
    losses = []
    with naive_connections(naive):
        for step in range(steps):
            rows = torch.stack([text[i : i + config.block_size + 1] for i in starts[step].tolist()]).to(device)
            with torch.autocast(torch.device(device).type, autocast) if autocast else contextlib.nullcontext():
                loss = model(rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).tolist()
