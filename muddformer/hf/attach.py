"""MUDD connections for causal models of transformers, in place."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..nn import ConnectionOptions, Connections
from ..nn.norm import register_norm
from ._attached import AttachedAttention, AttachedLayer, AttachedModel, Family, give_class, has_own_forward
from .devices import check_device_map, check_one_device

__all__ = ["FAMILIES", "attach", "load_attached"]

_SEPARATE = Family("self_attn", ("q_proj", "k_proj", "v_proj"), "rms_norm_eps")
# By model_type: the families whose layers were read and tested.
FAMILIES = {
    "llama": _SEPARATE,
    "mistral": _SEPARATE,
    "qwen2": _SEPARATE,
    "qwen3": _SEPARATE,
    "gpt_neox": Family("attention", ("query_key_value",), "layer_norm_eps"),
}
_ENTRY = "muddformer"  # of the configuration: the options


def attach(model: PreTrainedModel, options: ConnectionOptions | None = None, **fields: Any) -> PreTrainedModel:
    """Gives a Llama, Mistral, Qwen2, Qwen3 or GPT-NeoX model of transformers MUDD connections.

    The model is changed in place. Until it is trained it computes what it did, in float32 on a CPU to the last bit. Its
    classes, modules and parameters keep their names; new are the parameters ``connections.*`` of the base model, see
    :class:`muddformer.nn.Connections`, and the entry ``muddformer`` of the configuration. What the model saves
    (``save_pretrained``) is read by :func:`load_attached`.

    Attach first, before adapters, sharding, compiling and dispatching to devices.

    Args:
        model: a base model or one with a head, on one device.
        options: the options of the connections. None: the defaults, and ``multiway=True``.
        fields: single fields of :class:`muddformer.nn.ConnectionOptions`, in place of those in ``options``.

    Returns:
        The model.

    Raises:
        TypeError: if model is no PreTrainedModel of transformers, or for an unknown option.
        ValueError: naming the model and what is missing, if it is not of a supported family; if it has connections
            already, is wrapped, sharded or on several devices; or for options with which it would at once compute
            something else.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a PreTrainedModel of transformers, without wrappers, got {type(model).__name__}"
        )
    base = model.base_model
    if isinstance(base, AttachedModel):
        raise ValueError(f"model must have no connections yet, but {type(model).__name__} was attached to before")
    if getattr(model.config, _ENTRY, None) is not None:
        raise ValueError(
            f"model was saved with connections, which it was loaded without: load_attached() reads "
            f"{model.config.name_or_path!r} with them"
        )
    options = ConnectionOptions.of(options, fields, multiway=True)
    options.check_keeps_outputs()
    family = _family_of(model, base)
    _check_unwrapped(model, base, family)
    _attach(base, family, options)
    model.config.muddformer = base.config.muddformer = dataclasses.asdict(options)
    return model


def load_attached(path: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Reads a model that had connections when it was saved, of the class that it was saved as.

    Args:
        path: directory that ``save_pretrained`` wrote, or its name on a hub.
        kwargs: what ``from_pretrained`` of transformers takes (``dtype``, ``device_map`` with one device, ..).

    Raises:
        ValueError: if it has no connections, not all of their weights, an unknown class, or is put on several devices.
        OSError: from transformers, if there is no model.
    """
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(
        path, **{name: kwargs[name] for name in names if name in kwargs}
    )
    entry = getattr(config, _ENTRY, None)
    if entry is None:
        raise ValueError(f"{path} has no connections: from_pretrained() reads it and attach() gives it fresh ones")
    try:
        options = ConnectionOptions.of(None, entry)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: config.json, {_ENTRY}: {error}") from error
    origin = _class_of(path, config)

    class Loaded(origin):
        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            base = self.base_model
            _attach(base, _family_of(self, base), options)

    Loaded.__name__, Loaded.__qualname__, Loaded.__module__ = origin.__name__, origin.__qualname__, origin.__module__
    check_device_map(kwargs.get("device_map"))
    wants_info = kwargs.pop("output_loading_info", False)
    model, info = Loaded.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    if missing := sorted(name for name in info["missing_keys"] if "connections." in name):
        raise ValueError(f"{path} lacks {len(missing)} weights of its connections, among them {missing[0]}")
    check_device_map(getattr(model, "hf_device_map", None))
    model.__class__ = origin
    return (model, info) if wants_info else model


def _attach(base: PreTrainedModel, family: Family, options: ConnectionOptions) -> None:
    config, norm = base.config, getattr(base.layers[0], family.norm)
    weight = norm.weight
    connections = Connections(
        config.hidden_size,
        len(base.layers),
        options,
        eps=getattr(config, family.eps),
        device=weight.device,
        dtype=weight.dtype,
    )
    # RMSNorm of a family's own file, by the formula of ours.
    if type(norm).__module__ == type(base.layers[0]).__module__:
        register_norm(type(norm), "rms", "variance_epsilon")
    for layer in base.layers:
        give_class(getattr(layer, family.attention), AttachedAttention, family)
        give_class(layer, AttachedLayer, family)
    give_class(base, AttachedModel, family)
    base.connections = connections.train(base.training)


def _family_of(model: PreTrainedModel, base: PreTrainedModel) -> Family:
    """The family of a model, if it is a known one."""
    kind = base.config.model_type
    known = f"attach() knows {', '.join(FAMILIES)}"
    name = f"{type(model).__name__} (model_type {kind!r})"
    if missing := _missing_parts(base, FAMILIES.get(kind, _SEPARATE)):
        raise ValueError(f"{known}; {name} has no {', no '.join(missing)}")
    if kind not in FAMILIES:
        raise ValueError(f"{known}; {name} has parts of these names, but what its layers do with them is not known")
    return FAMILIES[kind]


def _missing_parts(base: nn.Module, family: Family) -> list[str]:
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return ["layers"]
    missing = [] if hasattr(layers[0], family.norm) else [f"{family.norm} in a layer"]
    attention = getattr(layers[0], family.attention, None)
    if attention is None:
        return [*missing, f"{family.attention} in a layer"]
    return missing + [f"{name} in {family.attention}" for name in family.projections if not hasattr(attention, name)]


def _check_unwrapped(model: PreTrainedModel, base: PreTrainedModel, family: Family) -> None:
    layers = list(base.layers)
    for module in (base, *layers, *(getattr(layer, family.attention, None) for layer in layers)):
        ours = type(module).__module__.startswith("transformers.") and has_own_forward(module)
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if not ours or compiled or (module in layers and not isinstance(module, GradientCheckpointingLayer)):
            raise ValueError(
                f"model must be as transformers made it, but a {type(module).__name__} in it is wrapped or compiled: "
                "attach() comes first"
            )
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise ValueError("model must not be sharded yet: attach() comes first")
    check_one_device("model", (parameter.device for parameter in model.parameters()))


def _class_of(path: str | os.PathLike[str], config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a model was saved as."""
    name = (config.architectures or [None])[0]
    cls = getattr(transformers, name or "", None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ValueError(f"{path} was saved as {name!r}, which transformers {transformers.__version__} does not have")
    return cls
