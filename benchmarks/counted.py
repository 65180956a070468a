"""Tables that need no GPU: what was counted or compiled, kept beside the results as `results/counted/*.json`.

`--label before` keeps the rows of an earlier commit beside those of this one: a run replaces what it measured anew of
its own label and version of Triton, and leaves the rest.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import triton

from .record import RESULTS, write_json
from .terminal import Table, show

FOLDER = "counted"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where rows are kept, and under which name."""
    parser.add_argument("--label", help="keep the rows under this name, such as `after`; left out, they are printed")
    parser.add_argument("--out", type=Path, default=RESULTS / FOLDER, help="folder of the tables that are kept")


def keep(name: str, table: Table, given: argparse.Namespace, identity: int = 0) -> None:
    """Print a table, and keep its rows if a label says so.

    Args:
        name: of the file.
        table: what this run found.
        given: from `add_arguments`.
        identity: so many cells say which row it is, and rows of other cells stay; 0 replaces all rows of the label.
    """
    show(table)
    if given.label is None:
        return
    path = given.out / f"{name}.json"
    found = [[given.label, triton.__version__, *row] for row in table.rows]
    anew = {tuple(row[: 2 + identity]) for row in found}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [row for row in before if tuple(row[: 2 + identity]) not in anew] + found
    content: dict[str, Any] = {
        "title": table.title, "headings": ["code", "Triton", *table.headings], "note": table.note, "rows": rows,
    }  # fmt: skip
    write_json(path, content)


def tables(folder: Path) -> list[Table]:
    """Return the tables kept below a folder of results."""
    found = []
    for path in sorted((folder / FOLDER).glob("*.json")):
        content = json.loads(path.read_text())
        rows = tuple(sorted((tuple(row) for row in content["rows"]), key=lambda row: (row[1], row[0] != "before")))
        found.append(Table(content["title"], tuple(content["headings"]), rows, note=content["note"]))
    return found
