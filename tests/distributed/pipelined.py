"""Cases of `torch.distributed.pipelining`: every schedule, stages compiled whole and block by block."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from mhc_compile import distributed

from .launch import run
from .models import attached, gap, gradients, in_one_graph, tokens

LAYERS, MICROBATCHES = 4, 8
INNER = {"inner": "aot_eager"}


class Part(nn.Module):
    """Some layers of a Llama, with its embedding if they are the first and its head if they are the last."""

    def __init__(self, llama: Any, layers: range) -> None:
        """Take modules out of the model, under the names that they have there."""
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(number): llama.model.layers[number] for number in layers})
        self.rotary = llama.model.rotary_emb
        if layers.start == 0:
            self.model.embed_tokens = llama.model.embed_tokens
        if layers.stop == LAYERS:
            self.model.norm = llama.model.norm
            self.lm_head = llama.lm_head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden state, or the logits."""
        if hasattr(self.model, "embed_tokens"):
            hidden = self.model.embed_tokens(hidden)
        positions = torch.arange(hidden.shape[1])[None]
        turns = self.rotary(hidden, positions)
        for layer in self.model.layers.values():
            hidden = layer(hidden, position_embeddings=turns)
        return self.lm_head(self.model.norm(hidden)) if hasattr(self, "lm_head") else hidden


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the loss that Hugging Face's Llama returns."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def places(schedule: Any) -> list[int]:
    """Return the stages of this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if schedule is Schedule1F1B:
        return [rank]
    if schedule in (ScheduleDualPipeV, ScheduleZBVZeroBubble):
        return [rank, 2 * world - 1 - rank]
    return [rank, rank + world]


def piped(schedule: Any, way: str, wrapped: bool = True) -> dict[str, Any]:
    """Train one step in a pipeline; loss and gradients against one process and one graph."""
    # Schedules that split the backward run a compiled one twice.
    torch._functorch.config.donated_buffer = False
    wanted_loss, wanted = in_one_graph(LAYERS, batch=2 * MICROBATCHES)
    model = attached(LAYERS)
    mine = places(schedule)
    count = dist.get_world_size() * len(mine)
    per = LAYERS // count
    stages, parts = [], []
    for number in mine:
        part = Part(model, range(number * per, (number + 1) * per))
        parts.append(part)
        if wrapped:
            distributed.stage(part)
        if way == "whole":
            part.compile(backend="mhc", options=INNER)
        else:
            for layer in part.model.layers.values():
                layer.compile(backend="mhc", options=INNER)
        stages.append(PipelineStage(part, number, count, torch.device("cpu")))
    pipeline = schedule(stages[0] if schedule is Schedule1F1B else stages, n_microbatches=MICROBATCHES, loss_fn=loss_of)
    ids, losses = tokens(2 * MICROBATCHES), []
    first, last = 0 in mine, count - 1 in mine
    pipeline.step(*((ids,) if first else ()), **({"target": ids, "losses": losses} if last else {}))
    loss = torch.stack(losses).mean().detach() if last else torch.zeros(())
    dist.all_reduce(loss)
    got = {name: value for part in parts for name, value in gradients(part).items()}
    return {
        "loss": abs(float(loss) - wanted_loss),
        "gradient": gap({name: wanted[name] for name in got}, got),
        "parameters": len(got),
    }


SCHEDULES = {
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBV": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}
CASES = {
    f"{name}, {way}": functools.partial(piped, schedule, way)
    for name, schedule in SCHEDULES.items()
    for way in ("whole", "by block")
    # A schedule knows nothing of how its stages are compiled.
    if way == "by block" or schedule in (Schedule1F1B, ScheduleDualPipeV)
}

if __name__ == "__main__":
    run(CASES)
