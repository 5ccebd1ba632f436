"""What a training step must not do: drift from the naive formulation, add gradients, break or recompile its graph."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from helpers.gradient_adds import gradient_adds
from helpers.models import make, scramble, some_ids
from helpers.op_samples import relative_error
from muddformer import MUDDFormer, MUDDFormerConfig, build_model
from muddformer.nn.naive import naive_connections
from muddformer.training.corpus import find_documents
from muddformer.training.optim import parameter_groups

KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
TINY = MUDDFormerConfig(
    n_layer=4, dim=64, n_head=4, vocab_size=256, block_size=64, intermediate_size=128, ffn_reallocation=False
)


@contextlib.contextmanager
def checkpointed(model: MUDDFormer, kind: str) -> Iterator[None]:
    """Every block is computed again in the backward: all of it ("full"), or not its matrix products and attention."""
    model.gradient_checkpointing = True
    if kind == "selective":
        model.checkpoint_context_fn = functools.partial(create_selective_checkpoint_contexts, KEPT)
    yield
    model.gradient_checkpointing, model.checkpoint_context_fn = False, None


def gradients(model: MUDDFormer, call: Callable[..., Tensor], ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    call(ids, ids).backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("variant", ["default", "pythia", "pre-post", "stride-2x2", "plain"])
def test_selective_checkpointing(variant: str) -> None:
    model, ids = scramble(make(variant)), some_ids()
    expected = gradients(model, model, ids)
    with checkpointed(model, "selective"):
        torch.testing.assert_close(gradients(model, model, ids), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("variant", ["default", "pre-post", "plain"])
def test_compiled_checkpointing(variant: str, kind: str, device: torch.device) -> None:
    torch._dynamo.reset()
    model, ids = scramble(make(variant, n_layer=3)).to(device), some_ids().to(device)
    expected = gradients(model, model, ids)
    with checkpointed(model, kind):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        torch.testing.assert_close(gradients(model, compiled, ids), expected, rtol=1e-4, atol=1e-5)


def most_live_bytes(graph: torch.fx.Graph) -> int:
    """The most that results of a graph take at any time, if each is freed after its last use; views take nothing."""

    def size(node: torch.fx.Node) -> int:
        value = node.meta.get("val")
        return int(value.numel() * value.element_size()) if isinstance(value, Tensor) and not value._is_view() else 0

    last_use = {used: i for i, node in enumerate(graph.nodes) for used in node.all_input_nodes}
    live = most = 0
    for i, node in enumerate(graph.nodes):
        live += size(node)
        most = max(most, live)
        live -= sum(size(used) for used in node.all_input_nodes if last_use[used] == i)
    return most


@pytest.mark.compile
def test_compiled_checkpointing_computes_block_by_block() -> None:
    def backward_bytes(layers: int) -> int:
        torch._dynamo.reset()
        model = make("default", n_layer=layers)
        graphs: list[torch.fx.Graph] = []

        def keep(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., list[Tensor]]:
            graphs.append(module.graph)
            return make_boxed_func(module.forward)

        backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
        with checkpointed(model, "full"):
            torch.compile(model, fullgraph=True, backend=backend, dynamic=False)(ids, ids).backward()
        return most_live_bytes(graphs[1])

    ids = some_ids(32, 24)
    hidden_state = ids.numel() * make("default").config.dim * 4
    # A layer more is its hidden state, gradients and parameters more; the activations of a block would be 37.
    assert backward_bytes(6) - backward_bytes(3) < 3 * 16 * hidden_state


@pytest.mark.parametrize("variant", ["default", "stride-2x2", "pre-post"])
def test_gradients_of_the_history_are_chained(variant: str) -> None:
    def adds(layers: int) -> int:
        return gradient_adds(make(variant, n_layer=layers)(ids, ids), 32)

    ids = some_ids()
    # Two more layers cost as many additions wherever they come, though later ones read more hidden states.
    assert adds(7) - adds(5) == adds(5) - adds(3)
    with naive_connections():
        assert adds(7) - adds(5) > adds(5) - adds(3)


@pytest.mark.compile
@pytest.mark.parametrize("variant", ["default", "pre-post"])
def test_training_compiles_once(variant: str, device: torch.device) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = scramble(make(variant, n_layer=3)).to(device), some_ids().to(device)
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        with torch.autocast(device.type, torch.bfloat16):
            loss = compiled(ids, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ids = ids.roll(1, 1)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.cuda
@pytest.mark.compile
@pytest.mark.parametrize("variant", ["default", "pre-post"])
def test_cuda_graphs(variant: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = scramble(make(variant, n_layer=3)).cuda(), some_ids(4, 16).cuda()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):  # warm-up, recording, replays
        ids = ids.roll(1, 1)
        expected = gradients(model, model, ids)
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(gradients(model, compiled, ids), expected, strict=True):
            assert relative_error(a, b) < 1e-3
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.cuda
@pytest.mark.compile
@pytest.mark.parametrize("variant", ["default", "pre-post", "stride-2x2"])
def test_cuda_graphs_of_blocks(variant: str) -> None:
    """Each block is a CUDA graph, and later blocks read what earlier graphs wrote: nothing may be overwritten."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, ids = scramble(make(variant, n_layer=3)).cuda(), some_ids(4, 16).cuda()
    in_graphs = copy.deepcopy(model)
    for block in in_graphs.layers:
        block.compile(mode="reduce-overhead", fullgraph=True)
    for _ in range(5):  # warm-up, recording, replays
        ids = ids.roll(1, 1)
        torch.compiler.cudagraph_mark_step_begin()
        for a, b in zip(gradients(in_graphs, in_graphs, ids), gradients(model, model, ids), strict=True):
            assert relative_error(a, b) < 1e-3
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            assert relative_error(in_graphs(ids), model(ids)) < 1e-3
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.cuda
@pytest.mark.compile
def test_an_overwritten_cuda_graph_is_never_silent() -> None:
    """Without a mark each graph called under no_grad may begin a step, where hidden states of earlier ones are lost."""
    torch._dynamo.reset()
    model, ids = scramble(make("default", n_layer=3)).cuda().eval(), some_ids(4, 16).cuda()
    expected = model(ids).detach()
    for block in model.layers:
        block.compile(mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(5):
            try:
                assert relative_error(model(ids), expected) < 1e-3
            except RuntimeError as error:
                assert "overwritten" in str(error)
                break


def training_losses(config: MUDDFormerConfig, *, naive: bool, device: torch.device) -> list[float]:
    """Of twenty steps on the source of the standard library, byte by byte, the same text in the same order."""
    text = b"".join(chunk for document in find_documents(())[:9] for chunk in document.chunks())
    text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    starts = torch.randint(len(text) - config.block_size, (20, 8), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = build_model(config).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), 1e-3, (0.9, 0.95))
    losses = []
    with naive_connections(naive):
        for offsets in starts.tolist():
            rows = torch.stack([text[i : i + config.block_size + 1] for i in offsets]).to(device)
            loss = model(rows[:, :-1].contiguous(), targets=rows[:, 1:].contiguous())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "changes",
    [{}, {"flush_interval": 3}, {"source_stride": 2, "block_stride": 2}],
    ids=["mudd", "deferred", "2x2"],
)
def test_follows_the_naive_formulation(changes: dict, device: torch.device) -> None:
    config = TINY.replace(**changes)
    fast, naive = (training_losses(config, naive=slow, device=device) for slow in (False, True))
    torch.testing.assert_close(fast, naive, rtol=0, atol=1e-4)
    assert fast[-1] < fast[0] - 1  # it learns
