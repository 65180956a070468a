"""Check liger-kernel and tile-kernels against the float64 definition, then time them beside ours.

    python -m benchmarks.peers [--device cuda] [--quick] [--minutes 8] [--only liger-kernel] [--out DIR]

Same inputs, same iterations, eps 0; layouts are converted before the clock starts. Packages that are not installed are
named and left out. Without a GPU there is nothing to time: with `TRITON_INTERPRET=1` liger-kernel's results are checked
in Triton's interpreter; tile-kernels needs a GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from mhc_compile.kernels.dispatch import reference_of

from .adapters import ADAPTERS, Adapter
from .figures import Panel, bars
from .implementations import implementations_of, prepare
from .kernels_report import total
from .precompile import precompile
from .problems import Shape, make_inputs
from .record import Benchmark, Options, Record, in_time, run_as_script
from .terminal import WRONG, Table, microseconds, say, track
from .timing import copies_to_rotate, copy_bandwidth, median_seconds

# Other packages round phi to bf16 or the projection to TF32: 3 digits. A transposed matrix is off by a whole one.
_TOLERANCE = 0.03
_CHECKED_TOKENS = 64


def shapes_for(options: Options) -> list[Shape]:
    """Return the shapes of every peer's operators, the most important first."""
    narrow = torch.bfloat16
    grid = [(8192, 4096, narrow), (1, 4096, narrow), (8192, 2560, narrow), (64, 4096, narrow)]
    if options.device == "cpu":
        # In bfloat16 liger-kernel's projection comes out wrong in Triton's interpreter (3.9), in these it is right.
        grid = [(8, 256, torch.float16), (8, 256, torch.float32)]
    elif options.quick:
        grid = grid[:1]
    names = ("post_pre", "pre", "post", "sinkhorn")
    return [Shape(name, tokens, 4, width, dtype, anchored=False) for tokens, width, dtype in grid for name in names]


def largest_error(adapter: Adapter, shape: Shape, device: str) -> float:
    """Return the largest error of outputs and gradients, as a share of the largest true entry of each.

    The truth is the definition in float64, on few tokens.
    """
    few = shape.with_tokens(min(shape.tokens, _CHECKED_TOKENS))
    tensors, constants = make_inputs(few, device)
    theirs = prepare(adapter.as_ours(shape.operator), tensors, constants)
    true = prepare(reference_of(shape.operator), [tensor.double() for tensor in tensors], constants)
    exact = torch.autograd.grad(true.outputs, true.leaves, [grad.double() for grad in theirs.grads])
    pairs = [*zip(theirs.outputs, true.outputs, strict=True), *zip(theirs.backward(), exact, strict=True)]
    errors = []
    for mine, right in pairs:
        error = (mine.double() - right).abs().max() / right.abs().max()
        # A NaN would lose every comparison.
        errors.append(float("inf") if error.isnan() else float(error.detach()))
    return max(errors)


def can_run(adapter: Adapter, shape: Shape, device: str) -> str | None:
    """Return why a package cannot compute a shape here, None if it can."""
    if not adapter.installed:
        return f"not installed (pip install {adapter.name})"
    if device == "cpu" and (adapter.name != "liger-kernel" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "needs a GPU; liger-kernel's results can be checked on a CPU with TRITON_INTERPRET=1"
    return adapter.refuses(shape)


def measure(call: Any, tensors: Any, options: Options, repeats: int) -> dict[str, float]:
    """Return median seconds of forward and backward on rotating inputs; `tensors(seed)` makes a set."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(0)[0])
    made = [(tensors(seed), seed) for seed in range(copies_to_rotate(size, options.device))]
    sets = [(prepare(call, leaves, constants, seed), constants) for (leaves, constants), seed in made]
    forwards = [lambda one=one, rest=constants: call(*one.leaves, *rest) for one, constants in sets]
    return {
        "forward_seconds": median_seconds(forwards, options.device, repeats),
        "backward_seconds": median_seconds([one.backward for one, _ in sets], options.device, repeats),
    }


def compare(shape: Shape, adapter: Adapter, options: Options, record: Record, bandwidth: float, repeats: int) -> None:
    """Add a row for a package at a shape: its error, and on a GPU its time."""
    where = f"{adapter.name}, {shape}"
    why = can_run(adapter, shape, options.device)
    if why is not None:
        record.skip(f"{adapter.name}, {shape.operator}" if not adapter.installed else where, why)
        return
    if not in_time(options, record, where, needs=5.0):
        return
    try:
        error = largest_error(adapter, shape, options.device)
        problems = [] if error <= _TOLERANCE else [f"its results differ from the definition by {error:.1%}"]
        seconds = {}
        if options.device == "cuda":

            def inputs(seed: int) -> Any:
                return adapter.convert(shape.operator, make_inputs(shape, options.device, seed)[0]), ()

            seconds = measure(lambda *given: adapter.call(shape.operator, given), inputs, options, repeats)
    except Exception as problem:
        # Another package's error is news about that package, and no failure of this one.
        record.skip(where, f"{type(problem).__name__}: {(str(problem).strip() or '-').splitlines()[0]}")
        return
    shares = _shares(shape, seconds, bandwidth)
    record.add(**shape.to_dict(), implementation=adapter.name, error=error, problems=problems, **seconds, **shares)


def _shares(shape: Shape, seconds: dict[str, float], bandwidth: float) -> dict[str, float]:
    return {
        f"{way}_share_of_copy": shape.traffic(way == "backward") / seconds[f"{way}_seconds"] / bandwidth
        for way in ("forward", "backward")
        if seconds
    }


def run(options: Options, record: Record) -> None:
    """Compare every installed package at every shape; ours is timed beside it."""
    cuda = options.device == "cuda"
    if not cuda:
        say("No GPU: peers are checked where Triton's interpreter can run them, and nothing is timed.")
    repeats = 5 if options.quick else 30
    bandwidth = copy_bandwidth(options.device, repeats) if cuda else float("nan")
    record.fact(tolerance=_TOLERANCE, copy_bytes_per_second=bandwidth if cuda else None)
    wanted = [adapter for adapter in ADAPTERS if options.wants(adapter.name)]
    present = [adapter for adapter in wanted if adapter.installed]
    if cuda and present:
        precompile(shapes_for(options))
    for shape in track(shapes_for(options), "peers"):
        if cuda and present:
            ours = next(iter(implementations_of(shape.operator).items()))
            if in_time(options, record, f"ours, {shape}"):
                seconds = measure(ours[1], lambda seed, one=shape: make_inputs(one, "cuda", seed), options, repeats)
                shares = _shares(shape, seconds, bandwidth)
                record.add(**shape.to_dict(), implementation=f"ours ({ours[0]})", **seconds, **shares)
        for adapter in wanted:
            if shape.operator in adapter.operators:
                compare(shape, adapter, options, record, bandwidth, repeats)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return one table: errors, and times side by side where there are any."""
    rows = result["rows"]
    if not rows:
        return []
    cells, best = [], set()
    for index, row in enumerate(rows):
        same = [other for other in rows if _shape(other) == _shape(row) and "forward_seconds" in other]
        right = [other for other in same if not other.get("problems")]
        if row in right and len(same) > 1 and row is min(right, key=total):
            best.add(index)
        ours = next((other for other in same if other["implementation"].startswith("ours")), None)
        cells.append(_cells(row, ours))
    timed = any("forward_seconds" in row for row in rows)
    table = Table(
        "Peers: the same operator on the same inputs" + ("" if timed else ", CPU: results only"),
        ("operator", "package", "tokens", "C", "dtype", "error", "forward", "share", "backward", "share", "to ours"),
        tuple(cells),
        frozenset(best),
        "Error: largest of outputs and gradients against float64, as a share; up to "
        f"{result['facts']['tolerance']:.0%} counts as the same operator, since peers round phi or its product; "
        f"{WRONG}: it is another, and the time is not comparable. Share: of the copy bandwidth, by least traffic. To "
        "ours: forward and backward together; above 1 is slower than ours.",
    )
    return [table]


def _shape(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("operator", "tokens", "n", "width", "dtype"))


def _cells(row: dict[str, Any], ours: dict[str, Any] | None) -> tuple[str, ...]:
    timed = "forward_seconds" in row
    times = []
    for way in ("forward", "backward"):
        times += [microseconds(row[f"{way}_seconds"]), f"{row[f'{way}_share_of_copy']:.0%}"] if timed else ["–", "–"]
    error = row.get("error")
    mark = f" {WRONG}" if row.get("problems") else ""
    names = (row["operator"], row["implementation"] + mark, str(row["tokens"]), str(row["width"]), row["dtype"])
    ratio = f"{total(row) / total(ours):.2f}" if timed and ours else "–"
    return (*names, "–" if error is None else f"{error:.1e}", *times, ratio)


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw forward and backward together, relative to ours, at the first shape of each operator."""
    rows = [row for row in result["rows"] if "forward_seconds" in row and not row.get("problems")]
    first = {row["operator"]: (row["tokens"], row["width"]) for row in reversed(rows)}
    rows = [row for row in rows if first[row["operator"]] == (row["tokens"], row["width"])]
    if not rows:
        return []
    operators = list(dict.fromkeys(row["operator"] for row in rows))
    values: dict[str, list[float | None]] = {}
    for peer in dict.fromkeys(row["implementation"].partition(" ")[0] for row in rows):
        named = {row["operator"]: row for row in rows if row["implementation"].partition(" ")[0] == peer}
        ours = {row["operator"]: row for row in rows if row["implementation"].startswith("ours")}
        values[peer] = [total(named[name]) / total(ours[name]) if name in named else None for name in operators]
    panel = Panel("time relative to ours", "", "ratio", line=(1.0, "ours"))
    path = bars(folder / "peers.png", panel, operators, values)
    return [(path, "Forward and backward together, relative to ours; lower is faster.")]


BENCHMARK = Benchmark("peers", "Peers: liger-kernel and tile-kernels", run, tables, figures)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
