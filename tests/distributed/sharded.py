"""Cases of FSDP2 in two processes: orders of sharding and compiling, checkpointing, precision, meta device."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import mhc_compile
from mhc_compile import distributed

from ..carrying import blocks_of, compile_blocks
from .launch import run
from .models import (
    INNER,
    as_attached,
    attached,
    decoder,
    differences,
    gap,
    gradients,
    in_one_graph,
    llama,
    loss_of,
    mine,
    tokens,
)


def shard(model: Any, own_group: bool = True, **options: Any) -> None:
    """Shard a model block by block."""
    if own_group:
        distributed.shard_parameters(model)
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def compiled(model: Any, way: str) -> Any:
    """Compile a model whole, in place, or block by block."""
    if way == "whole":
        return torch.compile(model, backend="mhc", options=INNER)
    if way == "in place":
        model.compile(backend="mhc", options=INNER)
    else:
        compile_blocks(model, backend="mhc", options=INNER)
    return model


def exact(
    way: str, first: str, reshard: bool, own_group: bool, checkpoint: bool = False, build: Any = decoder
) -> dict[str, Any]:
    """Attach, then shard and compile in either order; two steps' worth of gradients against one process."""
    model = attached(build=build)
    wanted = in_one_graph(build=build)
    if checkpoint:
        block_class = type(blocks_of(model)[0])
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, block_class))
    call = model
    if first == "compile":
        call = compiled(model, way)
    shard(model, own_group, reshard_after_forward=reshard)
    if first == "shard":
        call = compiled(model, way)
    loss = loss_of(call, mine(tokens()))
    loss.backward()
    once = differences(wanted, float(loss), model)
    model.zero_grad()
    loss = loss_of(call, mine(tokens()))
    loss.backward()
    again = differences(wanted, float(loss), model)
    return {key: max(once[key], again[key]) for key in once}


def stays_in_float32() -> dict[str, Any]:
    """Under a bf16 policy the mHC parameters enter the operators as they are, and their gradients are reduced so."""
    model = attached()
    twin = copy.deepcopy(model)
    for name, parameter in twin.named_parameters():
        if name not in mhc_compile.parameters(model):
            parameter.data = parameter.data.bfloat16()
    loss_of(torch.compile(twin, backend="mhc", options=INNER), mine(tokens())).backward()
    names = mhc_compile.parameters(twin)
    wanted = {name: parameter.grad / 2 for name, parameter in names.items()}
    for value in wanted.values():
        dist.all_reduce(value)
    torch._dynamo.reset()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss_of(compiled(model, "by block"), mine(tokens())).backward()
    got = {name: value for name, value in gradients(model).items() if name in names}
    return {"gradient": gap(wanted, got), "dtypes": sorted({str(value.dtype) for value in got.values()})}


def refuses_bf16() -> dict[str, Any]:
    """The same policy over a group that holds the mHC parameters as well."""
    model = attached()
    shard(model, own_group=False, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    loss_of(compiled(model, "by block"), mine(tokens()))
    return {}


def bf16_model() -> dict[str, Any]:
    """A bf16 model, whose mHC parameters FSDP2 would not take into the group of their block."""
    model = decoder().bfloat16()
    mhc_compile.attach(model, tokens(1))
    shard(model)
    loss = loss_of(compiled(model, "by block"), mine(tokens()))
    loss.backward()
    kept = {str(parameter.dtype) for parameter in mhc_compile.parameters(model).values()}
    return {"dtypes": sorted(kept), "finite": bool(loss.isfinite())}


def from_meta() -> dict[str, Any]:
    """Attach on meta, shard, materialize: the parameters start as those of a model that was never on meta."""
    wanted = as_attached()
    model = decoder().to("meta")
    mhc_compile.attach(model, tokens(1).to("meta"))
    shard(model)
    model.to_empty(device="cpu")
    names = mhc_compile.parameters(wanted)
    got = {name: parameter.full_tensor() for name, parameter in mhc_compile.parameters(model).items()}
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter.fill_(7.0)
    mhc_compile.reset_parameters(model)
    again = {name: parameter.full_tensor() for name, parameter in mhc_compile.parameters(model).items()}
    return {"equal": all(torch.equal(names[name], found[name]) for found in (got, again) for name in names)}


def attach_late() -> dict[str, Any]:
    """Attaching to a model that is sharded already."""
    model = decoder()
    shard(model, own_group=False)
    mhc_compile.attach(model, tokens(1))
    return {}


def never_attached() -> dict[str, Any]:
    """Compiling a sharded model that has no mHC parameters."""
    model = decoder()
    shard(model, own_group=False)
    loss_of(compiled(model, "by block"), mine(tokens()))
    return {}


def selective() -> dict[str, Any]:
    """Selective activation checkpointing of each block, around compiled ones."""
    model = attached()
    wanted = in_one_graph()
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    context = functools.partial(create_selective_checkpoint_contexts, keep)
    block_class = type(blocks_of(model)[0])
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(checkpoint_wrapper, context_fn=context),
        check_fn=lambda module: isinstance(module, block_class),
    )
    shard(model)
    loss = loss_of(compiled(model, "by block"), mine(tokens()))
    loss.backward()
    return differences(wanted, float(loss), model)


def hooks_in_order() -> dict[str, Any]:
    """The order in which FSDP2 gathers and reduces in the backward, beside that of a model without mHC."""
    orders = []
    for model in (decoder(3), attached(3)):
        with_mhc = bool(mhc_compile.parameters(model))
        shard(model, own_group=with_mhc)
        order: list[str] = []
        names = {id(block): f"block {number}" for number, block in enumerate(blocks_of(model))} | {id(model): "root"}
        states = {name: fully_shard.state(module) for module in model.modules() if (name := names.get(id(module)))}
        for name, state in states.items():
            for group in state._fsdp_param_groups:
                _record(group, "pre_backward", name, order)
                _record(group, "post_backward", name, order)
        call = compiled(model, "by block") if with_mhc else model
        loss_of(call, mine(tokens())).backward()
        orders.append(order)
    return {"plain": orders[0], "mhc": orders[1]}


def _record(group: Any, method: str, name: str, order: list[str]) -> None:
    plain = getattr(group, method)

    def recording(*args: Any, **kwargs: Any) -> Any:
        order.append(f"{method} {name}")
        return plain(*args, **kwargs)

    setattr(group, method, recording)


EXACT = {
    "whole, a Llama": ("whole", "shard", True, True, False, llama),
    "by block": ("by block", "shard", True, True),
    "by block, compiled before sharding, kept gathered": ("by block", "compile", False, True),
    "in place, compiled before sharding": ("in place", "compile", False, True),
    "by block, in the blocks' groups": ("by block", "shard", True, False),
    "whole, checkpointed": ("whole", "shard", True, True, True),
    "by block, checkpointed": ("by block", "shard", True, True, True),
}
CASES = {name: functools.partial(exact, *how) for name, how in EXACT.items()} | {
    "by block, selectively checkpointed": selective,
    "stays in float32": stays_in_float32,
    "refuses bf16": refuses_bf16,
    "bf16 model": bf16_model,
    "from meta": from_meta,
    "attach late": attach_late,
    "never attached": never_attached,
    "hooks in order": hooks_in_order,
}

if __name__ == "__main__":
    run(sharded=CASES)
