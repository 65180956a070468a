"""Cases of DistributedDataParallel in two processes, and of checkpoints by `torch.distributed.checkpoint`."""

from __future__ import annotations

import functools
import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import mhc_compile
from mhc_compile import distributed

from . import trained
from .launch import run
from .models import attached, average, differences, gradients, llama, loss_of, mine, tokens
from .parallel import decoder
from .parallel import loss_of as next_token_loss

INNER = {"inner": "aot_eager"}
LAYERS = 3


def ddp(optimize: Any, way: str) -> dict[str, Any]:
    """Two steps' gradients under DDP with a bucket a block, against one process."""
    wanted = in_one_process()
    model = decoder(LAYERS)
    # Dynamo's bucket for the first gradients holds 1 MB, more than this model has.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 8000
    block = 4 * sum(parameter.numel() for parameter in model.blocks[0].parameters())
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        if way == "inside":
            model.compile(backend="mhc", options=INNER)
        call: Any = DistributedDataParallel(model, bucket_cap_mb=block / 2**20)
        if way == "outside":
            call = torch.compile(call, backend="mhc", options=INNER)
        found = []
        for _ in range(2):
            model.zero_grad()
            loss = next_token_loss(call(mine(tokens())), mine(tokens()))
            loss.backward()
            found.append(differences(wanted, float(loss.detach()), model))
    return {key: max(entry[key] for entry in found) for key in found[0]}


@functools.cache
def in_one_process() -> tuple[float, dict[str, Tensor]]:
    """Return loss and gradients of the decoder in one graph."""
    model = decoder(LAYERS)
    loss = next_token_loss(torch.compile(model, backend="mhc", options=INNER)(tokens()), tokens())
    loss.backward()
    torch._dynamo.reset()
    return float(loss.detach()), gradients(model)


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
    folder = os.path.join(os.environ.get("MHC_OUTCOMES", tempfile.gettempdir()), "checkpoint")
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
    alone = llama(LAYERS)
    mhc_compile.attach(alone, input_ids=tokens(1))
    state = {"model": alone.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    alone.load_state_dict(state["model"])
    in_one = float(loss_of(torch.compile(alone, backend="mhc", options=INNER), tokens()).detach())
    return {"loss": wanted, "on two ranks": abs(again - wanted), "on one": abs(in_one - wanted)}


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


DDP = {
    f"DDP, optimize_ddp={optimize}, compiled {way}": functools.partial(ddp, optimize, way)
    for optimize in (False, "python_reducer", "ddp_optimizer")
    for way in ("inside", "outside")
}
CASES = (
    DDP
    | trained.CASES
    | {
        "checkpointed": checkpointed,
        "plain checkpoint": plain_checkpoint,
    }
)

if __name__ == "__main__":
    run(CASES)
