"""Operators on DTensors, and tensor parallelism: two processes compute what one does."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import muddformer
from helpers.models import make, scramble, some_ids
from helpers.processes import run_processes
from muddformer import MUDDFormer, _sharding, ops
from muddformer._imports import when_imported
from muddformer.distributed import distribute_connections, tensor_parallel
from muddformer.nn import MUDDStack

PROCESSES = 2
CHECKS: dict[str, Callable[[DeviceMesh, Path], None]] = {}  # all run in one pair of processes


def check(function: Callable[[DeviceMesh, Path], None]) -> Callable[[DeviceMesh, Path], None]:
    CHECKS[function.__name__] = function
    return function


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def assert_near(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> None:
    for a, b in zip(actual, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(whole(a), b, rtol=1e-3, atol=1e-4)


def layer(hiddens: list[Tensor], parameters: list[Tensor], deferred: bool, head: bool) -> Tensor:
    """Every operator that has gradients, once; head: the loss, which wants parameters as DTensors, too."""
    w1, w2, prior, scale, norm, pre, post = parameters
    deferral = None
    if deferred:
        older, (deferral,) = ops.defer_gradients(hiddens[:2], [(2, 3)])
        hiddens = [*older, hiddens[2]]
    weights, x = ops.connection_weights_chained(hiddens[-1], w1, w2, prior, scale=scale, cap=3.0)
    norms = ops.StreamNorms([norm, None], add_newest=True, pre_weight=pre, post_weight=post)
    streams, hiddens = ops.depth_aggregate_norm_chained([*hiddens[:-1], x], weights, norms, deferral=deferral)
    more, hiddens = ops.depth_aggregate_chained(hiddens, ops.connection_weights(streams[0], w1, w2, prior))
    loss = sum((y * y).sum() for y in (*streams, *more, *ops.depth_aggregate(hiddens, weights)))
    if not head:
        return loss
    targets = torch.arange(hiddens[0].shape[:-1].numel()).view(hiddens[0].shape[:-1]) % len(w1)
    losses = ops.linear_cross_entropy(streams[1], w1, targets, reduction="none", z_loss=0.1)
    return loss + ops.linear_cross_entropy(streams[0], w1, targets, reduction="sum") + losses.square().sum()


@check
def operators(mesh: DeviceMesh, _: Path) -> None:
    torch.manual_seed(0)
    for length in (5, 1):  # parts of 3 and 2 tokens; of one and none
        hiddens = [torch.randn(3, length, 8) for _ in range(3)]
        parameters = [torch.randn(*shape) for shape in ((12, 8), (6, 12), (2, 3), (8,), (8,), (8,), (8,))]
        for deferred in (False, True):
            for plain in (False, True):  # parameters that are plain tensors count as replicated
                leaves = [x.clone().requires_grad_() for x in (*hiddens, *parameters)]
                loss = layer(leaves[:3], leaves[3:], deferred, head=not plain)
                loss.backward()
                for placement in (Replicate(), Shard(0), Shard(1)):
                    own = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in hiddens]
                    own += [x.clone() if plain else distribute_tensor(x, mesh, [Replicate()]) for x in parameters]
                    for x in own[3:]:
                        x.requires_grad_()
                    together = layer(own[:3], own[3:], deferred, head=not plain)
                    together.backward()
                    assert_near([together, *(x.grad for x in own)], [loss, *(x.grad for x in leaves)])
                    assert all(x.grad.placements == (placement,) for x in own[:3])
                    assert plain or all(x.grad.placements == (Replicate(),) for x in own[3:])


@check
def steps_of_a_block(mesh: DeviceMesh, _: Path) -> None:
    torch.manual_seed(0)
    given = [torch.randn(4, 5, 8), torch.randn(4, 5, 8), torch.randn(4, 5, 4, 8), torch.randn(4, 5, 2, 8)]
    parameters = [torch.randn(8) for _ in range(4)]
    tables = torch.randn(5, 3), torch.randn(5, 3)

    def loss(x: Tensor, residual: Tensor, q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        total, normed = ops.add_norm(ops.swiglu(x, residual), residual, weights[0])
        _, layered = ops.add_norm(x, total, weights[0], weights[1], norm="layer")
        q, k = ops.qk_norm_rotary(q, k, *tables, *weights[2:])
        return sum((y * y).sum() for y in (ops.swiglu(normed), layered, q, k))

    leaves = [t.clone().requires_grad_() for t in (*given, *parameters)]
    expected = loss(*leaves)
    expected.backward()
    for rows, heads in ((Replicate(), Replicate()), (Shard(0), Shard(0)), (Shard(1), Shard(2))):
        for plain in (False, True):
            own = [distribute_tensor(x, mesh, [p]) for x, p in zip(given, (rows, rows, heads, heads), strict=True)]
            own += [x.clone() if plain else distribute_tensor(x, mesh, [Replicate()]) for x in parameters]
            own = [x.requires_grad_() for x in own]
            together = loss(*own)
            together.backward()
            assert_near([together, *(x.grad for x in own)], [expected, *(x.grad for x in leaves)])


@check
def linear_layers_and_the_loss(mesh: DeviceMesh, _: Path) -> None:
    torch.manual_seed(0)
    x, targets = torch.randn(3, 5, 8), torch.randint(12, (3, 5))
    targets[0, 1:4] = -100
    parameters = [torch.randn(*shape) for shape in ((8, 8), (8,), (12, 8), (12,))]
    for reduction in ("mean", "none"):

        def loss(x: Tensor, targets: Tensor, *parameters: Tensor, reduction: str = reduction) -> Tensor:
            w, b, head, bias = parameters
            losses = ops.linear_cross_entropy(ops.linear(x, w, b, residual=x), head, targets, bias, reduction=reduction)
            return (losses * losses).sum()

        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        expected = loss(leaves[0], targets, *leaves[1:])
        expected.backward()
        for placement in (Replicate(), Shard(0), Shard(1)):
            own = [
                distribute_tensor(x, mesh, [placement]),
                *(distribute_tensor(p, mesh, [Replicate()]) for p in parameters),
            ]
            own = [t.requires_grad_() for t in own]
            together = loss(own[0], distribute_tensor(targets, mesh, [placement]), *own[1:])
            together.backward()
            assert_near([together, *(t.grad for t in own)], [expected, *(t.grad for t in leaves)])


@check
def operators_whose_arguments_are_spread_differently(mesh: DeviceMesh, _: Path) -> None:
    hiddens, weights = [torch.randn(4, 6, 8, device="cpu") for _ in range(3)], torch.randn(4, 6, 2, 3)
    for x in (*hiddens, weights):
        dist.broadcast(x, 0)
    leaves = [x.clone().requires_grad_() for x in (*hiddens, weights)]
    expected = ops.depth_aggregate(leaves[:3], leaves[3])
    sum((y * y).sum() for y in expected).backward()
    own = [distribute_tensor(x, mesh, [p]) for x, p in zip(hiddens, (Replicate(), Shard(1), Shard(0)), strict=True)]
    own = [x.detach().requires_grad_() for x in (*own, weights)]  # the weights plain: all tokens on every process
    streams = ops.depth_aggregate(own[:3], own[3])
    assert all(y.placements == (Shard(1),) for y in streams)
    sum((y * y).sum() for y in streams).backward()
    assert_near([*streams, *(x.grad for x in own)], [*expected, *(x.grad for x in leaves)])
    with torch.no_grad():
        step = [torch.randn(20, 8), torch.randn(6, 20), torch.randn(2, 3)]
        for x in step:
            dist.broadcast(x, 0)
        spread = [distribute_tensor(x, mesh, [Shard(0)]) for x in hiddens]
        assert_near(ops.depth_aggregation_step(spread, *step), ops.depth_aggregation_step(hiddens, *step))


@check
def what_cannot_be_shared_is_refused(mesh: DeviceMesh, _: Path) -> None:
    def spread(shape: Sequence[int], placement: object) -> DTensor:
        return DTensor.from_local(torch.ones(shape), mesh, [placement], run_check=False)

    hidden, weights = spread((4, 8), Shard(0)), spread((4, 2, 1), Shard(0))
    other = distribute_tensor(torch.ones(8, 2, 1), DeviceMesh("cpu", [1, 0]), [Shard(0)])
    for x, w, message in (
        (spread((4, 8), Partial()), weights, r"hiddens\[0\]: expected Replicate, or Shard of .*: call redistribute"),
        (spread((8, 4), Shard(1)), weights, r"hiddens\[0\]: expected Replicate, or Shard of a dimension of tokens"),
        (hidden, spread((8, 1, 1), Shard(1)), "weights: expected Replicate, or Shard of a dimension of tokens"),
        (
            hidden,
            torch.ones(4, 2, 1),
            r"weights: expected a DTensor beside .* \[4, 2, 1\]: DTensor.from_local",
        ),
        (torch.ones(4, 8), weights, r"hiddens\[0\]: expected a DTensor, as weights is one, .*: DTensor.from_local"),
        (hidden, other, "weights: expected the mesh of the other DTensors"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.depth_aggregate([x], w)
    with pytest.raises(ValueError, match=r"weight: expected a DTensor, as hidden is one, .*: distribute_tensor"):
        ops.linear_cross_entropy(hidden, torch.ones(5, 8), torch.zeros(8, dtype=torch.int64))
    weight, bias = distribute_tensor(torch.ones(8, 8), mesh, [Replicate()]), torch.ones(8)
    with pytest.raises(ValueError, match="bias: expected a DTensor, as weight is one, got a plain tensor"):
        ops.linear(hidden, weight, bias)
    with pytest.raises(ValueError, match="bias: expected a plain tensor, as weight is one, got a DTensor"):
        ops.add_norm(hidden, hidden, bias, weight[0], norm="layer")
    config = make().config
    for model, bad_mesh, message in (
        (nn.Linear(2, 2), mesh, "model must be a MUDDFormer, got Linear"),
        (make(), None, "mesh must be a DeviceMesh, got NoneType"),
        (make(), init_device_mesh("cpu", (1, 2)), "mesh must have one dimension"),
        (make("mqa-tied"), mesh, "tie_word_embeddings=False"),
        (make(n_kv_heads=1), mesh, "n_kv_heads must be a multiple of the 2 devices"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            tensor_parallel(model, bad_mesh)
    with pytest.raises(TypeError, match="stack must be a MUDDStack"):
        distribute_connections(nn.Linear(2, 2), mesh)
    assert config == make().config


def both(name: str = "default", **changes: int) -> tuple[MUDDFormer, MUDDFormer, Tensor]:
    """Two models with the same weights, and token ids, the same in every process."""
    torch.manual_seed(0)
    alone = scramble(make(name, **changes), 0.1)
    model = make(name, **changes)
    model.load_state_dict(alone.state_dict())
    return alone, model, some_ids()  # 7 tokens: uneven parts


def step(model: nn.Module, ids: Tensor) -> list[Tensor]:
    """Loss, norm of the gradients and gradients by :func:`torch.nn.utils.clip_grad_norm_`, and new parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    loss = model(ids, ids)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    gradients = [None if p.grad is None else whole(p.grad) for p in model.parameters()]
    optimizer.step()
    optimizer.zero_grad()
    return [loss, norm, *gradients]


@check
def tensor_parallel_trains_and_generates(mesh: DeviceMesh, folder: Path) -> None:
    for name in ("pre-post", "static", "gqa", "flush-2", "plain-pythia"):
        alone, model, ids = both(name)
        assert tensor_parallel(model, mesh) is model
        assert all(isinstance(p, DTensor) for p in model.parameters())
        model.gradient_checkpointing = name == "pre-post"
        expected = step(alone, ids)
        assert_near(step(model, ids), expected)
        assert_near([model(ids, ids)], [alone(ids, ids)])
        assert all(p.grad is None or p.grad.placements == p.placements for p in model.parameters())
        tokens = muddformer.generate(alone, ids, max_new_tokens=4)
        assert torch.equal(muddformer.generate(model, ids, max_new_tokens=4), tokens)
    cache = model.new_cache(2, 8)
    with torch.no_grad():
        model(ids, cache=cache)
    assert cache.keys.shape[2] == alone.config.n_kv_heads // PROCESSES
    drawn = [muddformer.generate(m, ids, max_new_tokens=4, temperature=1.0, seed=1) for m in (alone, model)]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="seed must be given in tensor parallelism"):
        muddformer.generate(model, ids, max_new_tokens=4, temperature=1.0)
    model.save_pretrained(folder / "saved")
    assert_near(list(muddformer.from_pretrained(folder / "saved").parameters()), list(alone.parameters()))


@check
def tensor_parallel_under_other_things(mesh: DeviceMesh, _: Path) -> None:
    alone, model, ids = both()
    expected = step(alone, ids)
    two = init_device_mesh("cpu", (1, PROCESSES), mesh_dim_names=("data", "tensor"))
    tensor_parallel(model, two["tensor"])
    for block in model.layers:
        fully_shard(block, mesh=two["data"])
    assert_near(step(fully_shard(model, mesh=two["data"]), ids), expected)
    alone, model, ids = both(n_layer=1)
    tensor_parallel(model, mesh)
    model.compile(backend="aot_eager")
    assert_near(step(model, ids), step(alone, ids))


@check
def a_plan_of_ones_own(mesh: DeviceMesh, _: Path) -> None:
    """Norms by SequenceParallel, hidden states as DTensors, and connections that nobody has distributed."""
    for distributed in (False, True):
        alone, model, ids = both("no-qk-norm")
        spread = {"output_layouts": Shard(1), "use_local_output": False}
        plan = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), **spread),
            "layers.*.attention.w[qkv]": ColwiseParallel(input_layouts=Shard(1)),
            "layers.*.attention.wo": RowwiseParallel(**spread),
            "layers.*.feed_forward.w[13]": ColwiseParallel(input_layouts=Shard(1)),
            "layers.*.feed_forward.w2": RowwiseParallel(**spread),
            "layers.*.attention_norms.*": SequenceParallel(),
            "layers.0.attention_norm": SequenceParallel(),
            "layers.*.ffn_norm": SequenceParallel(),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        }
        parallelize_module(model, mesh, plan)
        if distributed:
            distribute_connections(model, mesh)
        ids = ids[:, :6]
        loss = alone(ids).square().mean()
        loss.backward()
        together = model(ids).square().mean()
        together.backward()
        assert_near([together, *(p.grad for p in model.parameters())], [loss, *(p.grad for p in alone.parameters())])
        assert torch.equal(
            muddformer.generate(model, ids, max_new_tokens=2), muddformer.generate(alone, ids, max_new_tokens=2)
        )


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.LayerNorm(16), nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(self.norm(x)) * self.scale


@check
def a_stack_of_ones_own_blocks(mesh: DeviceMesh, _: Path) -> None:
    torch.manual_seed(0)
    alone = scramble(MUDDStack([Scaled() for _ in range(3)], 16, pre_norm=True, post_norm="residual"), 0.1)
    stack = MUDDStack([Scaled() for _ in range(3)], 16, pre_norm=True, post_norm="residual")
    stack.load_state_dict(alone.state_dict())
    distribute_connections(stack, mesh)
    for block in stack.layers:
        distribute_module(block, mesh)
    x = torch.randn(2, 5, 16)
    expected = [y := alone(x), *torch.autograd.grad(y.square().sum(), list(alone.parameters()))]
    for placement in (Replicate(), Shard(0), Shard(1)):
        y = stack(distribute_tensor(x, mesh, [placement]))
        assert y.placements == (placement,)
        assert_near([y, *torch.autograd.grad(y.square().sum(), list(stack.parameters()))], expected)


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for name, function in CHECKS.items():
        try:
            function(mesh, Path(folder))
            outcome = ""
        except BaseException:
            outcome = traceback.format_exc()
        (Path(folder) / f"{name}.{rank}").write_text(json.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    run_processes(work, (str(folder),), PROCESSES)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_two_processes(outcomes: Path, name: str) -> None:
    for rank in range(PROCESSES):
        outcome = json.loads((outcomes / f"{name}.{rank}").read_text())
        assert not outcome, outcome


def test_rules_wait_for_what_takes_long_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_late.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    given, finders = [], len(sys.meta_path)
    when_imported("imported_late", lambda module: given.append(module.value))
    importlib.import_module("json")
    assert importlib.util.find_spec("imported_late") is not None  # asking is not importing
    assert given == []
    importlib.import_module("imported_late")
    assert given == [3]
    assert len(sys.meta_path) == finders
    when_imported("imported_late", lambda module: given.append(module.value))
    assert given == [3, 3]


def test_every_operator_has_a_rule() -> None:
    """But those that are made of others, and those that have no tensor to return."""
    schemas = [s for s in torch._C._jit_get_all_schemas() if s.name.startswith("muddformer::")]
    for schema in schemas:
        name = schema.name.removeprefix("muddformer::")
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "CompositeImplicitAutograd")
        answers = all("Tensor" not in str(result.type) for result in schema.returns)
        assert (name in _sharding.RULES) != (composite or answers), name
