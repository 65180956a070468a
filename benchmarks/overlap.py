"""How much of mHC's wider send a pipeline schedule hides: two ranks, sends that take as long as they are told.

    python -m benchmarks.overlap [--quick]

Two gloo processes on this CPU train the same small decoder with 1F1B and with DualPipeV, plain and with mHC, by torch's
own schedules. Sends are delayed as a link of a given bandwidth would delay them, and computations are padded to a given
time, both by sleep: the cores of this machine, and what else they do, then matter little. Steps with and without the
delay take turns; what the delay adds is exposed, the rest of the time that the busiest rank's sends took is hidden.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mhc_compile.reports.schedules import Schedule, play, schedule_of

from . import figures, overlap_figure
from .record import Benchmark, Options, Record, in_time, run_as_script
from .terminal import Table, say

RANKS = 2
CASES = tuple((model, schedule) for schedule in ("1F1B", "DualPipeV") for model in ("plain", "mhc"))
_ROOT = Path(__file__).parents[1]
_CASE_SECONDS = 400


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        width: C.
        blocks: of the decoder, two sites each.
        length: tokens of a microbatch, one sequence.
        microbatches: of a step.
        forward: seconds that a block's forward is padded to; its backward takes twice that.
        transfers: what the plain model's send takes, in forwards of a block, link by link.
        turns: steps measured with each link, and with none.
    """

    width: int
    blocks: int
    length: int
    microbatches: int
    forward: float
    transfers: tuple[float, ...]
    turns: int

    @property
    def bandwidths(self) -> list[float]:
        """Bytes a second of each link."""
        return [4 * self.length * self.width / (share * self.forward) for share in self.transfers]


FULL = Size(64, 4, 64, 8, 0.05, (0.2, 0.5, 1.0), 5)
QUICK = Size(32, 4, 16, 4, 0.01, (0.5,), 1)


def run(options: Options, record: Record) -> None:
    """Run every model and schedule, and keep a row for each link and a timeline for the slowest."""
    size = QUICK if options.quick else FULL
    record.fact(**asdict(size), bandwidths=size.bandwidths, ranks=RANKS)
    for model, schedule in CASES[-1:] if options.quick else CASES:
        case = f"{model}, {schedule}"
        if not options.wants(case) or not in_time(options, record, case, 30.0):
            continue
        found = _launched(size, model, schedule)
        if isinstance(found, str):
            record.fail(case, found)
        else:
            _keep(record, size, model, schedule, found)


def _launched(size: Size, model: str, schedule: str) -> list[list[dict[str, Any]]] | str:
    """Return what each rank saw, or what went wrong."""
    case = {
        "width": size.width, "blocks": size.blocks, "batch": 1, "length": size.length,
        "microbatches": size.microbatches, "mhc": model == "mhc", "schedule": schedule, "forward": size.forward,
        "warmup": 2, "turns": size.turns, "bandwidths": [None, *size.bandwidths],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "seen")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--rdzv-backend", "c10d",
            "--rdzv-endpoint", "localhost:0", "-m", f"{__package__}.overlap_child", str(target), json.dumps(case),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_CASE_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return f"did not end within {_CASE_SECONDS} seconds"
        if done.returncode:
            return done.stderr[-1500:]
        return [json.loads(target.with_suffix(f".{rank}.json").read_text()) for rank in range(RANKS)]


def _keep(record: Record, size: Size, model: str, schedule: str, seen: list[list[dict[str, Any]]]) -> None:
    table = schedule_of(schedule, RANKS, size.microbatches)
    by_link: dict[float | None, list[list[dict[str, Any]]]] = defaultdict(list)
    for ranks in zip(*seen, strict=True):
        by_link[ranks[0]["bandwidth"]].append(list(ranks))
    undelayed = [_seconds(step) for step in by_link[None]]
    actions = action_seconds(by_link[None], lambda start, end, alone: end - start)
    computed = action_seconds(by_link[None], lambda start, end, alone: alone)
    for bandwidth in size.bandwidths:
        steps = by_link[bandwidth]
        delayed = [_seconds(step) for step in steps]
        nbytes = steps[0][0]["sent"][0][0]
        transfer = nbytes / bandwidth
        exposed = statistics.median(slow - fast for slow, fast in zip(delayed, undelayed, strict=True))
        sends = max(table.sends(rank) for rank in range(RANKS))
        row = {
            "part": "step", "model": model, "schedule": schedule, "bandwidth": bandwidth, "sent_bytes": nbytes,
            "sends": sends, "transfer": transfer, "undelayed": statistics.median(undelayed),
            "delayed": statistics.median(delayed), "exposed": exposed, "hidden": 1 - exposed / (sends * transfer),
            "predicted": predicted(table, actions, transfer),
            "computed": {kind: statistics.mean(by_stage.values()) for kind, by_stage in computed.items()},
        }  # fmt: skip
        record.add(**row)
        case = f"{model}, {schedule}, a send takes {transfer * 1e3:.0f} ms"
        say(f"{case}: {exposed * 1e3:.0f} ms exposed, {row['hidden']:.0%} hidden")
    slowest = by_link[size.bandwidths[-1]]
    middle = sorted(slowest, key=_seconds)[len(slowest) // 2]
    record.add(part="timeline", model=model, schedule=schedule, ranks=[_spans(middle, rank) for rank in range(RANKS)])


def _seconds(step: list[dict[str, Any]]) -> float:
    return max(rank["end"] for rank in step) - min(rank["begin"] for rank in step)


def action_seconds(
    steps: list[list[dict[str, Any]]], taking: Callable[[float, float, float], float]
) -> dict[str, dict[int, float]]:
    """Return the median seconds of each kind of computation, stage by stage: of begin, end and time without padding."""
    taken: dict[tuple[str, int], list[float]] = defaultdict(list)
    for step in steps:
        for rank in step:
            for kind, stage, _, *times in rank["computed"]:
                taken[kind, stage].append(taking(*times))
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for (kind, stage), seconds in sorted(taken.items()):
        found[kind][stage] = statistics.median(seconds)
    return dict(found)


def predicted(table: Schedule, actions: dict[str, dict[int, float]], transfer: float) -> float:
    """Return what sends that take so long add to a step, by torch's schedule and the measured computations."""
    slow, fast = (play(table, lambda kind, stage: actions[kind][stage], each) for each in (transfer, 0.0))
    return slow.seconds - fast.seconds


def _spans(step: list[dict[str, Any]], rank: int) -> dict[str, Any]:
    """Return when a rank computed and sent, in milliseconds from the start of the step."""
    begin = min(one["begin"] for one in step)

    def since(moment: float) -> float:
        return round((moment - begin) * 1e3, 2)

    computed = step[rank]["computed"]
    return {
        "computed": [[kind, stage, chunk, since(start), since(end)] for kind, stage, chunk, start, end, _ in computed],
        "sent": [[since(start), since(end)] for _, start, end in step[rank]["sent"]],
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Return what each link adds to a step, and what computations took."""
    rows = [row for row in result["rows"] if row["part"] == "step"]
    if not rows:
        return []
    cells = [
        (
            row["model"], row["schedule"], f"{row['transfer'] * 1e3:.0f} ms",
            str(row["sends"]), f"{row['undelayed'] * 1e3:.0f} ms", f"{row['delayed'] * 1e3:.0f} ms",
            f"{row['exposed'] * 1e3:.0f} ms", f"{row['hidden']:.0%}", f"{row['predicted'] * 1e3:.0f} ms",
        )
        for row in rows
    ]  # fmt: skip
    facts = result["facts"]
    steps = Table(
        f"A step of {facts['microbatches']} microbatches on {facts['ranks']} ranks, {facts['blocks']} blocks of "
        f"{facts['forward'] * 1e3:.0f} ms forward and {facts['forward'] * 2e3:.0f} ms backward",
        (
            "model",
            "schedule",
            "one send",
            "sends",
            "undelayed",
            "delayed",
            "exposed",
            "hidden",
            "predicted",
        ),
        tuple(cells),
        note="Exposed: median of what the delay adds. Hidden: the share of the busiest rank's sends that it does not "
        "add; less than none where ranks wait for both their own and each other's sends, as in 1F1B; more than all is "
        "noise. Predicted: exposed, by `mhc_compile.reports.schedules` from how long computations took without delay.",
    )
    slow = {(row["model"], row["schedule"]): row["computed"] for row in rows}
    parts = tuple(
        (model, schedule, *(f"{seconds[kind] * 1e3:.1f} ms" if kind in seconds else "–" for kind in "FBIW"))
        for (model, schedule), seconds in slow.items()
    )
    return [
        steps,
        Table(
            "What a stage computes for a microbatch without the padding, mean over stages",
            ("model", "schedule", "forward", "backward", "input gradients", "weight gradients"),
            parts,
            note="The backward of a compiled block is one autograd node. torch cannot divide it: asked for input "
            "gradients it runs the whole, asked for weight gradients it runs it again.",
        ),
    ]


def drawn(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw the timelines into a folder."""
    rows = [row for row in result["rows"] if row["part"] == "timeline"]
    if not rows or not figures.available():
        return []
    return [
        (
            overlap_figure.timelines(folder / "overlap-timeline.png", rows),
            "One step on each rank over the slowest link: forward, backward and, below them, what it sends.",
        )
    ]


BENCHMARK = Benchmark("overlap", "Overlap: how much of the wider send a pipeline schedule hides", run, tables, drawn)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
