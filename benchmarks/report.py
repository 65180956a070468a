"""Rebuild `README.md` and the figures of a folder of results: no number in it is typed by hand.

    python -m benchmarks report [DIR]

DIR holds `results/<hardware>/<benchmark>.json`; left out, it is this folder. Results of different hardware never
share a table, nor do quick runs appear.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from . import counted, figures
from .record import Benchmark
from .terminal import markdown, say

MODULES = (
    "checks",
    "kernels",
    "peers",
    "peer_steps",
    "training_step",
    "compile_time",
    "native",
    "overlap",
    "stability",
    "upcycle",
)
_BEGIN = "<!-- Below this line: written by `python -m benchmarks report`. Edit benchmarks/introduction.md instead. -->"


def benchmarks() -> list[Benchmark]:
    """Return every benchmark, in the order of the report."""
    return [importlib.import_module(f"{__package__}.{name}").BENCHMARK for name in MODULES]


def rebuild(folder: Path) -> Path:
    """Write `folder/README.md` from the JSON below `folder/results`, and draw the figures beside the JSON.

    Raises:
        SystemExit: there are no results.
    """
    places = [place for place in sorted((folder / "results").iterdir()) if place.is_dir()]
    groups = [(place, load(place)) for place in places if place.name != counted.FOLDER]
    groups = [(place, results) for place, results in groups if results]
    if not groups:
        raise SystemExit(f"{folder / 'results'} holds no results: run `python -m benchmarks all --device cpu` first.")
    drawing = figures.available()
    if not drawing:
        say("matplotlib is not installed (pip install 'mhc-compile[bench]'): the figures stay as they are")
    # A GPU's results come first; a CPU's are for correctness and counts.
    groups.sort(key=lambda group: (_environment(group[1])["device"] == "cpu", group[0].name))
    parts = [(Path(__file__).parent / "introduction.md").read_text().rstrip(), _BEGIN]
    for place, results in groups:
        parts += _hardware_section(folder, place, results, drawing)
    tables = counted.tables(folder / "results")
    if tables:
        parts += ["## Counted and compiled, no GPU needed", *map(markdown, tables)]
    page = folder / "README.md"
    page.write_text("\n\n".join(parts) + "\n")
    return page


def load(place: Path) -> dict[str, dict[str, Any]]:
    """Return the results in one hardware's folder by benchmark, quick runs left out.

    Raises:
        SystemExit: a file holds no result.
    """
    found = {}
    for path in sorted(place.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            if not result["quick"]:
                found[result["benchmark"]] = result
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(
                f"{path} is no result of a benchmark ({type(error).__name__}: {error}): run the benchmark again, or "
                "delete the file."
            ) from error
    return found


def _environment(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    environment: dict[str, Any] = next(iter(results.values()))["environment"]
    return environment


def _hardware_section(folder: Path, place: Path, results: dict[str, dict[str, Any]], drawing: bool) -> list[str]:
    environment = _environment(results)
    parts = [f"## {environment['hardware']}"]
    if environment["device"] == "cpu":
        parts.append(
            "No GPU: these results show correctness, counted bytes, compile time and stability. Their times are those "
            "of a CPU and say nothing about the GPU kernels."
        )
    for benchmark in benchmarks():
        if benchmark.name in results:
            parts += _benchmark_section(folder, place, benchmark, results[benchmark.name], drawing)
    return parts


def _benchmark_section(
    folder: Path, place: Path, benchmark: Benchmark, result: dict[str, Any], drawing: bool
) -> list[str]:
    parts = [f"### {benchmark.title}", provenance(result)]
    parts += [markdown(table) for table in benchmark.tables(result)]
    if drawing:
        for path, caption in benchmark.figures(result, place):
            parts.append(f"![{caption}]({path.relative_to(folder).as_posix()})")
    for key, heading in (("failures", "Failed"), ("skipped", "Not measured")):
        entries = result[key]
        if entries:
            parts.append("\n".join([f"{heading}:", "", *(f"- {_entry(entry)}" for entry in _folded(entries))]))
    return parts


def _entry(entry: tuple[str, list[str]]) -> str:
    why, what = entry
    named = "; ".join(what[:3]) + (f"; and {len(what) - 3} more" if len(what) > 3 else "")
    return f"{named}: {why}"


def _folded(entries: list[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the cases by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        reasons.setdefault(entry["why"], []).append(entry["case"])
    return list(reasons.items())


def provenance(result: dict[str, Any]) -> str:
    """Return one paragraph: when, with which versions, and what disturbed the run."""
    environment = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    sentences = [f"{result['started']}, {result['seconds']:.0f} s, commit {environment['commit']}; {versions}."]
    loads = [load for load in (environment["load"], result.get("load_at_end")) if load is not None]
    cores = environment["cpu"]["cores"]
    if loads and max(loads) > 1.5 * cores:
        sentences.append(f"The machine was busy: a load of up to {max(loads):g} on {cores} cores. Times are noisy.")
    if result["note"]:
        sentences.append(f"Note: {result['note']}.")
    if not result["complete"]:
        sentences.append("Stopped early: rows are missing.")
    return " ".join(sentences)
