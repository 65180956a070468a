"""One rank of `benchmarks.overlap`: trains a small decoder in a pipeline whose sends take as long as they are told.

Launched by torchrun; the first argument is the file to write, the second the case as JSON.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class
from torch.nn import functional

import mhc_compile
from mhc_compile.reports.schedules import stages_per_rank

HEADS = 4


class Block(nn.Module):
    """A pre-norm block of a decoder."""

    def __init__(self, width: int) -> None:
        """Create attention and MLP."""
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        parts = self.qkv(self.norms[0](hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        return hidden + self.down(functional.gelu(self.up(self.norms[1](hidden))))


class Stack(nn.Module):
    """Blocks, between two linear maps where the first or the last of them is among them."""

    def __init__(self, width: int, blocks: int) -> None:
        """Create all of it."""
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def cut(self, start: int, stop: int) -> Stack:
        """Return a stage, which shares this module's parameters."""
        part = Stack.__new__(Stack)
        nn.Module.__init__(part)
        part.first = self.first if start == 0 else nn.Identity()
        part.last = self.last if stop == len(self.blocks) else nn.Identity()
        part.blocks = self.blocks[start:stop]
        return part

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [B, S, C] to [B, S, C]."""
        hidden = self.first(hidden)
        for block in self.blocks:
            hidden = block(hidden)
        return self.last(hidden)


class SlowSends:
    """Has every `isend` arrive as late as a link of so many bytes a second would, one after the other.

    A thread sleeps, and sends then: a core is free meanwhile, as it would be beside a network adapter.
    """

    def __init__(self) -> None:
        """Take the place of torch's `isend`."""
        self.bandwidth = float("inf")
        self.sent: list[tuple[int, float, float]] = []
        self._send = distributed_c10d.isend
        self._queue: queue.Queue[tuple[_Sending, Tensor, dict[str, Any], float]] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()
        dist.isend = distributed_c10d.isend = self

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> _Sending:
        """Queue a tensor."""
        if args:
            kwargs["dst"] = args[0]
        sending = _Sending()
        self._queue.put((sending, tensor, kwargs, time.monotonic()))
        return sending

    def _run(self) -> None:
        free = 0.0
        while True:
            sending, tensor, kwargs, posted = self._queue.get()
            start = max(posted, free)
            time.sleep(max(0.0, start + tensor.nbytes / self.bandwidth - time.monotonic()))
            work = self._send(tensor, **kwargs)
            free = time.monotonic()
            self.sent.append((tensor.nbytes, start, free))
            work.wait()
            sending.done.set()


class _Sending(dist.Work):
    """What `isend` returns."""

    def __init__(self) -> None:
        super().__init__()
        self.done = threading.Event()

    def wait(self, timeout: Any = None) -> bool:
        return self.done.wait()

    def is_completed(self) -> bool:
        return self.done.is_set()


class Watch:
    """Notes when a stage computes, and has it take as long as it is told.

    What is computed here is small, and padded by sleep: what else runs on the machine then changes little.

    Attributes:
        spans: kind, stage, microbatch, begin, end, and the seconds without the padding.
    """

    def __init__(self, stages: list[PipelineStage], seconds: dict[str, float]) -> None:
        """Wrap what schedules call."""
        self.seconds = seconds
        self.spans: list[tuple[str, int, int, float, float, float]] = []
        for stage in stages:
            self._wrap(stage, "forward_one_chunk", lambda kwargs: "F")
            self._wrap(stage, "backward_one_chunk", lambda kwargs: "B" if kwargs.get("full_backward", True) else "I")
            self._wrap(stage, "backward_weight_one_chunk", lambda kwargs: "W")

    def _wrap(self, stage: PipelineStage, name: str, kind: Any) -> None:
        plain = getattr(stage, name)

        def watched(chunk: int, *args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            result = plain(chunk, *args, **kwargs)
            name, done = kind(kwargs), time.monotonic()
            time.sleep(max(0.0, start + self.seconds[name] - done))
            self.spans.append((name, stage.stage_index, chunk, start, time.monotonic(), done - start))
            return result

        setattr(stage, name, watched)


def pipeline(case: dict[str, Any]) -> tuple[Any, list[int], Watch]:
    """Return a schedule over this rank's stages, their numbers, and what watches them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Stack(case["width"], case["blocks"])
    if case["mhc"]:
        mhc_compile.attach(model, torch.zeros(case["batch"], case["length"], case["width"]))
    per_rank = stages_per_rank(case["schedule"])
    count = ranks * per_rank
    places = [rank] if per_rank == 1 else [rank, count - 1 - rank]
    size = case["blocks"] // count
    stages = []
    for place in places:
        part = model.cut(place * size, (place + 1) * size)
        if case["mhc"]:
            mhc_compile.distributed.stage(part)
        for block in part.blocks:
            if case["mhc"]:
                block.compile(backend="mhc", options={"inner": "aot_eager"})
            else:
                block.compile(backend="aot_eager")
        stages.append(PipelineStage(part, place, count, torch.device("cpu")))
    forward = size * case["forward"]
    watch = Watch(stages, {"F": forward, **dict.fromkeys("BIW", 2 * forward)})
    made = get_schedule_class(case["schedule"])(
        stages if per_rank > 1 else stages[0], n_microbatches=case["microbatches"], loss_fn=functional.mse_loss
    )
    return made, places, watch


def main() -> None:
    """Run the case and write what this rank saw."""
    target, case = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    # A compiled stage's backward is one autograd node: schedules that divide it run it twice.
    torch._functorch.config.donated_buffer = False
    dist.init_process_group("gloo")
    sends = SlowSends()
    schedule, places, watch = pipeline(case)
    shape = (case["microbatches"] * case["batch"], case["length"], case["width"])
    generator = torch.Generator().manual_seed(1)
    inputs, wanted = (torch.randn(shape, generator=generator) for _ in range(2))
    first = 0 in places
    last = any(stage.is_last for stage in getattr(schedule, "_stages", [getattr(schedule, "_stage", None)]))
    rows = []
    # Delayed and undelayed steps take turns, so that what else the machine does disturbs both alike.
    for turn in range(case["warmup"] + case["turns"]):
        for bandwidth in case["bandwidths"]:
            sends.bandwidth = bandwidth or float("inf")
            watch.spans.clear()
            sends.sent.clear()
            dist.barrier()
            begin = time.monotonic()
            schedule.step(*((inputs,) if first else ()), **({"target": wanted} if last else {}))
            dist.barrier()
            end = time.monotonic()
            if turn >= case["warmup"]:
                rows.append({
                    "bandwidth": bandwidth, "begin": begin, "end": end,
                    "computed": list(watch.spans), "sent": list(sends.sent),
                })  # fmt: skip
    target.with_suffix(f".{dist.get_rank()}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
