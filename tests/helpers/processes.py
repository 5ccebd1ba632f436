"""Processes that compute something together."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable

import torch
import torch.multiprocessing


def run_processes(work: Callable[..., None], args: tuple, processes: int, *packages: str) -> None:
    """Calls ``work(rank, *args)`` in as many processes.

    Without a GPU all are forked from one server, which has imported torch and the given packages: that takes longer
    than most work. The first call decides what the server imports. With one each process starts anew, since what has
    asked for GPUs cannot be forked.
    """
    if torch.cuda.is_available():
        torch.multiprocessing.spawn(work, args, processes)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.tensor.parallel", *packages])
    torch.multiprocessing.start_processes(work, args, processes, start_method="forkserver")
