"""Cases of DistributedDataParallel in two processes, and of checkpoints by `torch.distributed.checkpoint`."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mhc_compile import distributed

from ..carrying import compile_blocks
from .launch import run
from .models import (
    INNER,
    as_attached,
    attached,
    average,
    decoder,
    differences,
    in_one_graph,
    loss_of,
    mine,
    small_first_bucket,
    tokens,
)

LAYERS = 3


def ddp(optimize: Any, way: str) -> dict[str, Any]:
    """Two steps' gradients under DDP with a bucket a block, against one process."""
    wanted = in_one_graph(LAYERS)
    model = attached(LAYERS)
    block = 4 * sum(parameter.numel() for parameter in model.blocks[0].parameters())
    with small_first_bucket(), torch._dynamo.config.patch(optimize_ddp=optimize):
        if way == "inside":
            model.compile(backend="mhc", options=INNER)
        call: Any = DistributedDataParallel(model, bucket_cap_mb=block / 2**20)
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
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    compile_blocks(model, backend="mhc", options=INNER)
    return model


def checkpointed() -> dict[str, Any]:
    """Save a sharded model, load it into another sharded one; the test loads it into one process."""
    folder = os.path.join(os.environ.get("MHC_OUTCOMES", tempfile.gettempdir()), "checkpoint")
    model = sharded(attached(LAYERS))
    wanted = average(float(loss_of(model, mine(tokens())).detach()))
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder)
    other = sharded(as_zeros())
    state = {"model": get_model_state_dict(other)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    again = average(float(loss_of(other, mine(tokens())).detach()))
    alone = as_zeros()
    state = {"model": alone.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    alone.load_state_dict(state["model"])
    in_one = float(loss_of(torch.compile(alone, backend="mhc", options=INNER), tokens()).detach())
    return {"loss": wanted, "on two ranks": abs(again - wanted), "on one": abs(in_one - wanted)}


def as_zeros() -> Any:
    """Return an attached model in which every parameter is zero."""
    model = as_attached(LAYERS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def plain_checkpoint() -> dict[str, Any]:
    """Load a plain model's state into an attached and sharded model: what it computes is the plain model's."""
    plain = decoder(LAYERS)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(1.5)
    wanted = average(float(loss_of(plain, mine(tokens())).detach()))
    model = sharded(as_attached(LAYERS))
    options = StateDictOptions(full_state_dict=True, strict=False)
    missing = set_model_state_dict(model, plain.state_dict(), options=options).missing_keys
    loss = average(float(loss_of(model, mine(tokens())).detach()))
    return {"difference": abs(loss - wanted), "missing": sorted({name.split(".mhc.")[0] for name in missing})}


DDP = {
    f"DDP, optimize_ddp={optimize}, compiled {way}": functools.partial(ddp, optimize, way)
    for optimize in (False, "python_reducer", "ddp_optimizer")
    for way in ("inside", "outside")
}
CASES = DDP | {"checkpointed": checkpointed, "plain checkpoint": plain_checkpoint}

if __name__ == "__main__":
    run(replicated=CASES)
