"""What every benchmark shares: its options, its JSON file, and how it is run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .environment import environment, load_average, slug
from .terminal import Table, say, show

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("build") / "benchmarks"
SCHEMA = 1


@dataclass(frozen=True)
class Options:
    """What the command line decides.

    Attributes:
        device: "cuda" or "cpu".
        quick: a run of less than a minute on two CPU cores, to see that everything works.
        out: the folder of JSON files, one folder per hardware below it.
        deadline: `time.monotonic()` at which to stop; what is done by then is kept.
        note: goes into the JSON, such as "other jobs ran on this machine".
        only: names of cases to run; empty is all.
    """

    device: str
    quick: bool = False
    out: Path = QUICK_RESULTS
    deadline: float = float("inf")
    note: str = ""
    only: tuple[str, ...] = ()

    @property
    def seconds_left(self) -> float:
        """Time until the deadline."""
        return self.deadline - time.monotonic()

    def wants(self, case: str) -> bool:
        """Whether a case of this name is to be run."""
        return not self.only or case in self.only


@dataclass
class Record:
    """A result while it grows; each `add` writes the whole file anew, so that a killed run leaves what it had."""

    benchmark: str
    path: Path
    content: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    def fact(self, **facts: Any) -> None:
        """Keep figures that hold for the whole run."""
        self.content.setdefault("facts", {}).update(facts)
        self.write()

    def add(self, **row: Any) -> None:
        """Keep one row."""
        self.content.setdefault("rows", []).append(row)
        self.write()

    def skip(self, what: str, why: str) -> None:
        """Keep the name of a case that was not measured, and why."""
        say(f"{what}: not measured: {why}")
        self.content.setdefault("skipped", []).append({"case": what, "why": why})
        self.write()

    def fail(self, what: str, why: str) -> None:
        """Keep a failed check; the run will exit with 1."""
        say(f"{what}: FAILED: {why}")
        self.content.setdefault("failures", []).append({"case": what, "why": why})
        self.write()

    def write(self) -> None:
        """Write the file in one step: a reader, or a run that is killed, never sees half of it."""
        self.content["seconds"] = round(time.monotonic() - self.begun, 1)
        write_json(self.path, self.content)


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: of its module and its JSON file.
        title: one line, the heading in the report.
        run: measures, and adds rows to the record.
        tables: the tables of a result.
        figures: draws a result into a folder and returns (file, caption) of each figure.
    """

    name: str
    title: str
    run: Callable[[Options, Record], None]
    tables: Callable[[dict[str, Any]], list[Table]]
    figures: Callable[[dict[str, Any], Path], list[tuple[Path, str]]] = lambda result, folder: []


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in one step: to a file beside it, which then takes its name.

    Args:
        path: the file; its folder is made.
        content: JSON types, with at least one key beside "rows"; each row becomes one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    others = {key: value for key, value in content.items() if key != "rows"}
    rows = ",".join(f"\n  {json.dumps(row)}" for row in content.get("rows", []))
    head = json.dumps(others, indent=1).removesuffix("\n}")
    draft.write_text(f'{head},\n "rows": [{rows}\n ]\n}}\n')
    draft.replace(path)


def path_of(benchmark: str, options: Options) -> Path:
    """Return the file of a result: `OUT/<hardware>/<benchmark>.json`."""
    return options.out / slug(environment(options.device)["hardware"]) / f"{benchmark}.json"


def run_child(module: str, *arguments: str, limit: float, cache: str | None = None) -> dict[str, Any]:
    """Run a module in a process of its own, and return the JSON that its last line is.

    Args:
        module: its name; it is looked for in this repository first.
        arguments: its command line.
        limit: seconds that it may take; a second at least, and for ever if infinite.
        cache: the folder in which Inductor and Triton keep what they compile; left out, the user's.

    Raises:
        RuntimeError: the process failed; the message is the last line of its errors.
        subprocess.TimeoutExpired: the time is up.
    """
    environment = dict(os.environ)
    if cache is not None:
        # Both caches: Inductor's own, and Triton's for the kernels.
        environment |= {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": os.path.join(cache, "triton")}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=None if limit == float("inf") else max(limit, 1.0),
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or f"status {done.returncode}").splitlines()[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def execute(benchmark: Benchmark, options: Options) -> int:
    """Run a benchmark, write its JSON, print its tables; return 1 if a check failed."""
    if options.device == "cpu":
        # Where others use the cores too, threads that wait for each other take ten times as long.
        torch.set_num_threads(1)
    record = Record(benchmark.name, path_of(benchmark.name, options))
    record.content = {
        "benchmark": benchmark.name,
        "schema": SCHEMA,
        "complete": False,
        "quick": options.quick,
        "note": options.note,
        "environment": environment(options.device),
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "facts": {},
        "rows": [],
        "skipped": [],
        "failures": [],
    }
    try:
        benchmark.run(options, record)
    except KeyboardInterrupt:
        record.skip("the rest", "stopped by hand")
    late = any(entry["why"] == OUT_OF_TIME for entry in record.content["skipped"])
    record.content["complete"] = not late
    record.content["load_at_end"] = load_average()
    record.write()
    for table in benchmark.tables(record.content):
        show(table)
    say(f"written: {record.path}")
    return 1 if record.content["failures"] else 0


OUT_OF_TIME = "out of time"


def in_time(options: Options, record: Record, case: str, needs: float = 0.0) -> bool:
    """Whether `needs` seconds are left; if not, note that the case was left out."""
    if options.seconds_left > needs:
        return True
    record.skip(case, OUT_OF_TIME)
    return False


def parse(doc: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Read the options that every benchmark has.

    Args:
        doc: the module's docstring; its first line becomes the help.
        arguments: left out, those of the command line.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    add_common(parser)
    parser.add_argument("--only", action="append", default=[], help="a case by its name; may be given again")
    given = parser.parse_args(arguments)
    return options_from(parser, given, tuple(given.only))


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every benchmark and `all` share."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cuda", "cpu"], default=default)
    parser.add_argument("--quick", action="store_true", help="less than a minute on two CPU cores")
    parser.add_argument("--minutes", type=float, help="stop after this time; what was measured is kept")
    parser.add_argument("--out", type=Path, help=f"folder of JSON files; default {RESULTS.name}/ or {QUICK_RESULTS}")
    parser.add_argument("--note", default="", help="kept in the JSON: what disturbed the run, for example")


def options_from(parser: argparse.ArgumentParser, given: argparse.Namespace, only: tuple[str, ...] = ()) -> Options:
    """Turn parsed arguments into options; a device that is not there is an error."""
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; --device cpu checks correctness and counts bytes")
    return Options(
        device=given.device,
        quick=given.quick,
        out=given.out or (QUICK_RESULTS if given.quick else RESULTS),
        deadline=time.monotonic() + 60.0 * given.minutes if given.minutes else float("inf"),
        note=given.note,
        only=only,
    )


def run_as_script(benchmark: Benchmark, doc: str | None) -> None:
    """Run a benchmark from the command line and leave with its status."""
    sys.exit(execute(benchmark, parse(doc)))
