"""Cases of DistributedDataParallel in two processes, and of checkpoints by `torch.distributed.checkpoint`."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mhc_compile
from mhc_compile import distributed

from .launch import run
from .models import attached, average, differences, in_one_graph, llama, loss_of, mine, tokens

INNER = {"inner": "aot_eager"}
LAYERS = 3


def ddp(optimize: Any, way: str) -> dict[str, Any]:
    """Two steps' gradients under DDP with several buckets, against one process."""
    wanted = in_one_graph(LAYERS)
    model: Any = attached(LAYERS)
    # Dynamo's bucket for the first gradients holds 1 MB, more than this model has.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 10_000
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        if way == "inside":
            model.compile(backend="mhc", options=INNER)
        call = DistributedDataParallel(model, bucket_cap_mb=0.03)
        if way == "outside":
            call = torch.compile(call, backend="mhc", options=INNER)
        found = []
        for _ in range(2):
            model.zero_grad()
            loss = loss_of(call, mine(tokens()))
            loss.backward()
            found.append(differences(wanted, float(loss.detach()), model))
    return {key: max(entry[key] for entry in found) for key in found[0]}


def sharded(model: Any) -> Any:
    """Shard a model and compile its blocks."""
    distributed.shard_parameters(model)
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    for block in model.model.layers:
        block.compile(backend="mhc", options=INNER)
    return model


def checkpointed() -> dict[str, Any]:
    """Save a sharded model, load it into another sharded one; the test loads it into one process."""
    folder = os.environ.get("MHC_CHECKPOINT") or tempfile.gettempdir() + "/mhc_checkpoint_of_cases"
    model = sharded(attached(LAYERS))
    wanted = average(float(loss_of(model, mine(tokens())).detach()))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    other = llama(LAYERS)
    mhc_compile.attach(other, input_ids=tokens(1))
    sharded(other)
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    again = average(float(loss_of(other, mine(tokens())).detach()))
    return {"loss": wanted, "loaded": again}


def plain_checkpoint() -> dict[str, Any]:
    """Load a plain model's state into an attached and sharded model: what it computes is the plain model's."""
    plain = llama(LAYERS)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    wanted = average(float(loss_of(plain, mine(tokens())).detach()))
    model = llama(LAYERS)
    mhc_compile.attach(model, input_ids=tokens(1))
    sharded(model)
    options = StateDictOptions(full_state_dict=True, strict=False)
    missing = set_model_state_dict(model, plain.state_dict(), options=options).missing_keys
    loss = average(float(loss_of(model, mine(tokens())).detach()))
    return {"difference": abs(loss - wanted), "missing": sorted({name.split(".mhc.")[0] for name in missing})}


CASES = {
    f"DDP, optimize_ddp={optimize}, compiled {way}": functools.partial(ddp, optimize, way)
    for optimize in (False, "ddp_optimizer", "python_reducer")
    for way in ("inside", "outside")
} | {"checkpointed": checkpointed, "plain checkpoint": plain_checkpoint}

if __name__ == "__main__":
    run(CASES)
