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
from .models import INNER, attached, decoder, gap, gradients, in_one_graph, llama, next_token_loss, tokens

LAYERS, MICROBATCHES = 4, 4


class Part(nn.Module):
    """Some blocks of a decoder, with its embedding if they are the first and its head if they are the last."""

    def __init__(self, model: Any, layers: range) -> None:
        """Take modules out of the model, under the names that they have there."""
        super().__init__()
        self.blocks = nn.ModuleDict({str(number): model.blocks[number] for number in layers})
        if layers.start == 0:
            self.embedding = model.embedding
        if layers.stop == len(model.blocks):
            self.norm, self.head = model.norm, model.head

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden state, or the logits."""
        if hasattr(self, "embedding"):
            hidden = self.embedding(hidden)
        for block in self.blocks.values():
            hidden = block(hidden)
        return self.head(self.norm(hidden)) if hasattr(self, "head") else hidden


class LlamaPart(nn.Module):
    """The same of a Llama."""

    def __init__(self, llama: Any, layers: range) -> None:
        """Take modules out of the model, under the names that they have there."""
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(number): llama.model.layers[number] for number in layers})
        self.rotary = llama.model.rotary_emb
        if layers.start == 0:
            self.model.embed_tokens = llama.model.embed_tokens
        if layers.stop == len(llama.model.layers):
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


def places(schedule: Any) -> list[int]:
    """Return the stages of this rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if schedule is Schedule1F1B:
        return [rank]
    if schedule in (ScheduleDualPipeV, ScheduleZBVZeroBubble):
        return [rank, 2 * world - 1 - rank]
    return [rank, rank + world]


def piped(schedule: Any, way: str, build: Any = decoder, layers: int = LAYERS, wrapped: bool = True) -> dict[str, Any]:
    """Train one step in a pipeline; loss and gradients against one process and one graph."""
    wanted_loss, wanted = in_one_graph(layers, build)
    model = attached(layers, build)
    mine = places(schedule)
    count = dist.get_world_size() * len(mine)
    per = layers // count
    stages, parts = [], []
    for number in mine:
        part = (LlamaPart if build is llama else Part)(model, range(number * per, (number + 1) * per))
        parts.append(part)
        if wrapped:
            distributed.stage(part)
        if way == "whole":
            part.compile(backend="mhc", options=INNER)
        else:
            for block in part.blocks.values():
                block.compile(backend="mhc", options=INNER)
        stages.append(PipelineStage(part, number, count, torch.device("cpu")))
    pipeline = schedule(
        stages[0] if schedule is Schedule1F1B else stages, n_microbatches=MICROBATCHES, loss_fn=next_token_loss
    )
    ids, losses = tokens(), []
    first, last = 0 in mine, count - 1 in mine
    # Schedules that split the backward run a compiled one twice.
    with torch._functorch.config.patch(donated_buffer=False):
        pipeline.step(*((ids,) if first else ()), **({"target": ids, "losses": losses} if last else {}))
    loss = torch.stack(losses).mean().detach() if last else torch.zeros(())
    dist.all_reduce(loss)
    got = {name: value for part in parts for name, value in gradients(part).items()}
    return {
        "loss": abs(float(loss) - wanted_loss),
        "gradient": gap({name: wanted[name] for name in got}, got),
        "parameters": len(got),
    }


def by_block() -> dict[str, Any]:
    """Every schedule on stages whose blocks are compiled alone: they share what is compiled."""
    return {name: piped(schedule, "by block") for name, schedule in SCHEDULES.items()}


def unwrapped() -> None:
    """A pipeline whose first stage was not given to `mhc_compile.distributed.stage`: it has to end every rank."""
    piped(Schedule1F1B, "by block", wrapped=False)


SCHEDULES = {
    "1F1B": Schedule1F1B,
    "Interleaved1F1B": ScheduleInterleaved1F1B,
    "InterleavedZeroBubble": ScheduleInterleavedZeroBubble,
    "ZBV": ScheduleZBVZeroBubble,
    "DualPipeV": ScheduleDualPipeV,
}
# A schedule knows nothing of how its stages are compiled: one that splits the backward, and one that does not.
WHOLE = {
    "1F1B, whole, a Llama": functools.partial(piped, Schedule1F1B, "whole", llama, 2),
    "DualPipeV, whole": functools.partial(piped, ScheduleDualPipeV, "whole"),
}
CASES = WHOLE | {"by block": by_block}

if __name__ == "__main__":
    run(pipelined=CASES)
