"""Write the page of architectures that were run: `python -m tests.compatibility`.

`tests/compatibility.json` comes from `python -m tests.zoo_oracle --zoo PATH --json tests/compatibility.json`; the page
is `tests/compatibility.md`. No line of it is typed by hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
_HEAD = """# Compatibility: architectures that were run

Written by `python -m tests.compatibility` from runs of {dates}: torch {torch}, transformers {transformers}, CPU. Each
is built tiny with random weights, attached, its mHC parameters perturbed by 0.3·randn, compiled, and compared with an
independent interpreter of its plain graph (`tests/oracle.py`), outputs and the gradients of all parameters, in one of
{choices} combinations of fusion, recomputation, manifold, streams and readout.

{equal} of {all} equal it (outputs within 1e-5, every gradient within 1e-4); {none} more have no residual add between
two branches, or carry streams of their own.{missing}
"""


def page(content: dict[str, Any], choices: int) -> str:
    """Return the page as Markdown."""
    records = sorted(content["records"], key=lambda record: record["name"])
    equal = sum(record["verdict"] == "ok" for record in records)
    built = [record for record in records if not record["verdict"].startswith("not built")]
    nothing = sum(record["verdict"] == "no sites" for record in records)
    absent = ", ".join(record["name"] for record in records if record not in built)
    missing = f" Not built with this transformers: {absent}." if absent else ""
    counts = {"equal": equal, "all": len(built) - nothing, "none": nothing, "missing": missing}
    days = sorted({record["date"] for record in records})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    head = _HEAD.format(dates=dates, **content["versions"], choices=choices, **counts)
    lines = [head, "| architecture | sites | outputs differ by | gradients by | result |", "|---|--:|--:|--:|---|"]
    for record in built:
        differences = [f"{record[key]:.0e}" if key in record else "–" for key in ("out", "gradient")]
        cells = (record["name"], str(record.get("sites", "–")), *differences, _result(record["verdict"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _result(verdict: str) -> str:
    """Return a verdict on one line, short enough for a table."""
    words = " ".join(verdict.replace("|", "/").split())
    if words in ("ok", "no sites"):
        return "equal" if words == "ok" else words
    return f"**{words[:157] + '…' if len(words) > 158 else words}**"


def main() -> None:
    """Read the records and write the page."""
    from .zoo_oracle import CHOICES

    content = json.loads((FOLDER / "compatibility.json").read_text())
    (FOLDER / "compatibility.md").write_text(page(content, len(CHOICES)))


if __name__ == "__main__":
    main()
