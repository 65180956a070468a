"""torchtitan's models with mHC: its own functions parallelize and cut them, and nothing of it is patched.

    from mhc_compile.distributed.torchtitan import with_mhc

    spec = with_mhc(model_registry("8B"))   # a ModelSpec, as the trainer's config takes it

What torchtitan does with a model is done to one that is attached: `parallelize_fn` and `pipelining_fn` of the spec are
wrapped. torchtitan 0.3.0 compiles each block with a backend's name and no options, and refuses other names than its own
beside flex attention; so it is left to compile with the backend of its config, and the blocks' compilation is then
replaced by ours, which has that backend as its inner one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..api import attach
from ..attachment.site_parameters import OwnedParameters, SiteParameters, attached_config, owners_in
from ..config import STRUCTURAL, MHCConfig
from ..errors import MHCOptionError
from .sharding import shard_parameters
from .stages import stage

# Inner compilers that lower flex attention.
_FLEX = ("inductor",)


def with_mhc(spec: Any, config: MHCConfig | Mapping[str, Any] | None = None) -> Any:
    """Return torchtitan's description of a model, with mHC.

    Args:
        spec: a `torchtitan.protocols.model_spec.ModelSpec`.
        config: the options; `inner` is left to `compile.backend` of torchtitan's config.

    Returns:
        A copy of the spec, whose functions attach the model they are given, unless it is attached already.
    """
    config = config if isinstance(config, MHCConfig) else MHCConfig(**(config or {}))
    return replace(
        spec,
        parallelize_fn=_parallelizing(spec.parallelize_fn, config),
        pipelining_fn=spec.pipelining_fn and _pipelining(spec.pipelining_fn, config),
    )


def adopt(model: nn.Module) -> None:
    """Make a model's mHC parameters modules by torchtitan's protocol.

    It refuses others (`verify_module_protocol`). `init_weights` then resets them with the rest of the model.
    """
    for _, _, owned in owners_in(model):
        for module in owned.modules():
            if isinstance(module, OwnedParameters | SiteParameters):
                kind: Any = type(module)
                module.__class__ = _adopted(kind)


@functools.cache
def _adopted(kind: Any) -> Any:
    from torchtitan.protocols.module import Module

    return kind if issubclass(kind, Module) else type(kind.__name__, (kind, Module), {"__module__": kind.__module__})


def _prepared(model: nn.Module, length: int, config: MHCConfig) -> None:
    """Attach a whole model, on the meta device or not."""
    if attached_config(model) is None:
        device = next(model.parameters()).device
        with _traceable(model):
            attach(model, torch.zeros(1, length, dtype=torch.long, device=device), config=config)
    adopt(model)


@contextlib.contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Inside, attention that wants masks and a GPU is torchtitan's plain one: on the meta device torch has no other."""
    from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention

    held = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, FlexAttention | VarlenAttention)
    ]
    plain = ScaledDotProductAttention(ScaledDotProductAttention.Config())
    try:
        for parent, name, _ in held:
            setattr(parent, name, plain)
        yield
    finally:
        for parent, name, child in held:
            setattr(parent, name, child)


def _pipelining(plain: Callable[..., Any], config: MHCConfig) -> Callable[..., Any]:
    @functools.wraps(plain)
    def pipelining(model: nn.Module, *, training: Any, **others: Any) -> Any:
        _prepared(model, training.seq_len, config)
        return plain(model, training=training, **others)

    return pipelining


def _parallelizing(plain: Callable[..., nn.Module], config: MHCConfig) -> Callable[..., nn.Module]:
    @functools.wraps(plain)
    def parallelize(
        model: nn.Module, *, parallel_dims: Any, training: Any, parallelism: Any, compile_config: Any, **others: Any
    ) -> nn.Module:
        _check(model, parallelism, compile_config)
        if parallel_dims.pp_enabled:
            # The whole model was attached before it was cut; a stage may have no block.
            if attached_config(model) is not None:
                stage(model)
        else:
            _prepared(model, training.seq_len, config)
        if attached_config(model) is not None:
            offload = _offload() if training.enable_cpu_offload else {}
            shard_parameters(model, _data_mesh(parallel_dims), **offload)
        model = plain(
            model,
            parallel_dims=parallel_dims,
            training=training,
            parallelism=parallelism,
            compile_config=compile_config,
            **others,
        )
        options = {name: value for name, value in asdict(config).items() if name not in STRUCTURAL}
        layers: Any = model.layers
        for block in layers.children():
            block.compile(backend="mhc", options={**options, "inner": compile_config.backend}, fullgraph=True)
        return model

    return parallelize


def _check(model: nn.Module, parallelism: Any, compile_config: Any) -> None:
    if not compile_config.enable or "model" not in compile_config.components:
        raise MHCOptionError(
            'mHC is a backend of torch.compile: set compile.enable in torchtitan\'s config, with "model" among '
            "compile.components."
        )
    if compile_config.backend == "mhc":
        raise MHCOptionError(
            "compile.backend of torchtitan's config names the inner compiler here: leave it at 'inductor'."
        )
    if parallelism.spmd_backend != "partial_dtensor":
        raise MHCOptionError(
            f"parallelism.spmd_backend={parallelism.spmd_backend!r} wants the layout of every parameter from the "
            "model's own config, where mHC's are none: set 'partial_dtensor'."
        )
    flex = any(type(module).__name__ == "FlexAttention" for module in model.modules())
    if flex and compile_config.backend not in _FLEX:
        raise MHCOptionError(
            f"this model uses flex attention, which compile.backend={compile_config.backend!r} would run as plain "
            "operators: set 'inductor'."
        )


def _data_mesh(parallel_dims: Any) -> Any:
    """Return the mesh that torchtitan shards parameters over."""
    return parallel_dims.get_mesh(["dp_replicate", "fsdp"] if parallel_dims.dp_replicate_enabled else ["fsdp"])


def _offload() -> dict[str, Any]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    return {"offload_policy": CPUOffloadPolicy()}
