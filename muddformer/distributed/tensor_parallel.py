"""Tensor parallelism: heads and hidden units over devices, hidden states over the sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from ..models import MUDDFormer, not_a_model
from ..nn import Connections

__all__ = ["distribute_connections", "tensor_parallel"]


def distribute_connections(stack: Connections, mesh: DeviceMesh) -> None:
    """Makes the parameters of connections DTensors, the same on every device of a mesh; those of the first count.

    For a stack of blocks of one's own whose hidden states are DTensors. Gradients are added up over the mesh.

    Args:
        stack: a :class:`muddformer.nn.MUDDStack`, a model, or :class:`muddformer.nn.Connections`. It is changed.
        mesh: of one dimension.

    Raises:
        TypeError, ValueError: for something else.
    """
    if not isinstance(stack, Connections):
        raise TypeError(f"stack must be a MUDDStack or Connections, got {type(stack).__name__}")
    _check_mesh(mesh)
    for module in (stack.dense_bs, stack.dynamic_dense, stack.source_norms):
        _replicate(module, mesh)


def tensor_parallel(model: MUDDFormer, mesh: DeviceMesh) -> MUDDFormer:
    """Spreads a model over the devices of a mesh, which all take part in every forward, backward and generation.

    Each device has its part of the heads, of the hidden units of feed-forward networks and of the vocabulary, all of
    the other parameters, and between those its part of the sequence: hidden states are DTensors with Shard(1), so the
    history takes a part of the memory, and connections and norms send nothing. Logits and loss are plain tensors, whole
    on every device. All devices are given the same ``input_ids``.

    Call it before the optimizer is made, and before fully_shard over another dimension of a mesh of two.

    Args:
        model: a model of :func:`muddformer.build_model`. It is changed; values are those of the first device.
        mesh: of one dimension, for example ``init_device_mesh("cuda", (8,))``.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    if not isinstance(model, MUDDFormer):
        raise not_a_model(model)
    _check_mesh(mesh)
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError("model must not be spread over devices yet, got one whose parameters are DTensors")
    config, size = model.config, mesh.size()
    if config.tie_word_embeddings:
        raise ValueError("model must have tie_word_embeddings=False to be spread over devices, got True")
    for name in ("n_head", "n_kv_heads"):
        if getattr(config, name) % size != 0:
            raise ValueError(
                f"{name} must be a multiple of the {size} devices of the mesh, got {getattr(config, name)}"
            )
    styles = {
        "wq": ColwiseParallel(),
        "wk": ColwiseParallel(),
        "wv": ColwiseParallel(),
        "q_norm": SequenceParallel(sequence_dim=2, use_local_output=True),  # of heads, [B, T, H, E]
        "k_norm": SequenceParallel(sequence_dim=2, use_local_output=True),
        "wo": RowwiseParallel(output_layouts=Partial(), use_local_output=False),
        "w1": ColwiseParallel(),
        "w3": ColwiseParallel(),
        "w2": RowwiseParallel(output_layouts=Partial(), use_local_output=False),
    }
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    for i, layer in enumerate(model.layers):
        attention, feed_forward = layer.attention, layer.feed_forward
        for module in (attention.wq, attention.wk, attention.wv, feed_forward):
            module.register_forward_pre_hook(_gather)
        for part in ("attention", "feed_forward"):
            names = layer.get_submodule(part)._modules
            plan |= {f"layers.{i}.{part}.{name}": styles[name] for name in names if names[name] is not None}
    model.output.register_forward_pre_hook(_gather)
    parallelize_module(model, mesh, plan)
    for layer in model.layers:
        for module in (layer.attention.wo, layer.feed_forward.w2):
            module.register_forward_hook(_scatter)
    _replicate(model, mesh)
    return model


def _gather(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Hidden states of all of the sequence, for a module that has a part of the width."""
    return (_dense(inputs[0].redistribute(placements=[Replicate()])), *inputs[1:])


def _scatter(_: nn.Module, __: Any, y: DTensor) -> DTensor:
    """Sums up what modules with parts of the width made, each device its part of the sequence."""
    if y.requires_grad:
        y.register_hook(_dense)
    return y.redistribute(placements=[Shard(1)])


def _dense(x: DTensor) -> DTensor:
    """Uneven parts of a sequence are gathered with gaps between them, which torch 2.11's linear does not take."""
    return x.clone(memory_format=torch.contiguous_format) if x.shape[1] % x.device_mesh.size() else x


def _replicate(root: nn.Module, mesh: DeviceMesh) -> None:
    """Makes all parameters DTensors that are none yet, the same on every device, and so are all their gradients."""
    for module in root.modules():
        if any(not isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False)):
            distribute_module(module, mesh)
    for parameter in root.parameters():
        if all(placement.is_replicate() for placement in parameter.placements):
            # PyTorch's own operators leave sums over all devices to be made later, which clip_grad_norm_ of torch 2.11
            # does not know.
            parameter.register_hook(lambda grad: grad.redistribute(placements=[Replicate()]))


def _check_mesh(mesh: DeviceMesh) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, such as mesh['tp'] of a larger one, got {mesh.ndim}")
