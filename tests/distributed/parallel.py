"""Cases of DTensor's tensor parallelism: the stream replicated, divided over tokens, or a DTensor itself."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from mhc_compile import distributed

from .decoder import Decoder
from .launch import run
from .models import attached, average, gap, gradients, in_one_graph, loss_of, tokens


def parallelize(model: Decoder, mesh: DeviceMesh, stream: str) -> None:
    """Split a decoder over a mesh; the stream is "replicated", "local" (each rank's tokens) or a "dtensor"."""
    layout = Replicate() if stream == "replicated" else Shard(1)
    local = stream != "dtensor"
    norm = SequenceParallel(use_local_output=local) if stream != "replicated" else None
    whole = PrepareModuleInput(input_layouts=(layout,), desired_input_layouts=(Replicate(),))
    for block in model.blocks:
        plan: dict[str, Any] = {
            "attention": whole, "mlp": whole,
            "attention.q": ColwiseParallel(), "attention.k": ColwiseParallel(), "attention.v": ColwiseParallel(),
            "attention.o": RowwiseParallel(output_layouts=layout, use_local_output=local),
            "mlp.up": ColwiseParallel(),
            "mlp.down": RowwiseParallel(output_layouts=layout, use_local_output=local),
        }  # fmt: skip
        if norm is not None:
            plan |= {"attention_norm": norm, "mlp_norm": norm}
        parallelize_module(block, mesh, plan)
    ends: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=layout, use_local_output=local),
        "head": ColwiseParallel(input_layouts=layout, output_layouts=Replicate()),
    }
    if norm is not None:
        ends["norm"] = norm
    parallelize_module(model, mesh, ends)


def compile_blocks(model: Decoder, stream: str, inner: str = "aot_eager") -> None:
    """Compile each block alone."""
    if stream != "dtensor":
        # torch 2.13 fails on the plain model as well: a compiled block whose input is an asynchronous redistribution
        # hands back a plain gradient where that wants a DTensor.
        model.embedding.register_forward_hook(lambda module, args, output: output * 1.0)
    for block in model.blocks:
        block.compile(backend="mhc", options={"inner": inner})


def exact(stream: str, way: str, inner: str = "aot_eager", readout: str = "mean") -> dict[str, Any]:
    """Two steps' gradients of a decoder that is split over two ranks, against one process."""
    wanted = in_one_graph(readout=readout)
    model = attached(readout=readout)
    parallelize(model, init_device_mesh("cpu", (2,)), stream)
    call: Any = model
    if way == "whole":
        call = torch.compile(model, backend="mhc", options={"inner": inner})
    else:
        compile_blocks(model, stream, inner)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = loss_of(call, tokens())
        loss.backward()
        found.append((abs(float(loss.detach()) - wanted[0]), gap(wanted[1], gradients(model))))
    return {"loss": max(loss for loss, _ in found), "gradient": max(gradient for _, gradient in found)}


def with_fsdp() -> dict[str, Any]:
    """Data and tensor parallel at once, on four ranks: FSDP2 over two, a sequence-parallel stream over two."""
    wanted = in_one_graph()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = attached()
    parallelize(model, mesh["tensor"], "local")
    distributed.shard_parameters(model, mesh["data"])
    for block in model.blocks:
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    compile_blocks(model, "local")
    share = tokens().chunk(2)[mesh["data"].get_local_rank()]
    loss = loss_of(model, share)
    loss.backward()
    return {"loss": abs(average(float(loss.detach())) - wanted[0]), "gradient": gap(wanted[1], gradients(model))}


EXACT = {
    "replicated, whole": functools.partial(exact, "replicated", "whole"),
    "local, by block": functools.partial(exact, "local", "by block"),
    "dtensor, by block": functools.partial(exact, "dtensor", "by block"),
    "local, learned readout": functools.partial(exact, "local", "by block", readout="learned"),
    "dtensor, learned readout": functools.partial(exact, "dtensor", "whole", readout="learned"),
    "local, inductor": functools.partial(exact, "local", "whole", "inductor"),
}

CASES = EXACT
SHARDED_CASES = {"local, FSDP2": with_fsdp}

if __name__ == "__main__":
    run(parallel=CASES if int(os.environ["WORLD_SIZE"]) == 2 else SHARDED_CASES)
