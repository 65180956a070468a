"""Tables, progress bars and messages; plain text where `rich` is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")
BEST = "best"
# Beside what fails its check: its time is that of something else.
WRONG = "✗"


@dataclass(frozen=True)
class Table:
    """A table for the terminal and for Markdown.

    Attributes:
        title: what it shows, with the unit where all columns share one.
        headings: one per column.
        rows: cells as text.
        best: indices of the rows to mark: the choice that the figures speak for.
        note: what a reader must know to read it right.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[int] = frozenset()
    note: str = ""

    def __post_init__(self) -> None:
        """Check that every row has a cell for each heading."""
        for row in self.rows:
            if len(row) != len(self.headings):
                raise ValueError(f"{self.title}: {len(row)} cells under {len(self.headings)} headings: {row}")

    def marked(self) -> list[tuple[str, ...]]:
        """Return the rows, the best ones marked in their first cell."""
        return [
            (f"{row[0]} ◀ {BEST}" if index in self.best else row[0], *row[1:]) for index, row in enumerate(self.rows)
        ]


def markdown(table: Table) -> str:
    """Return a table as Markdown: bold title, rows with the best in bold, note."""
    lines = [f"**{table.title}**", "", _line(table.headings)]
    lines.append(_line([":--", *("--:" for _ in table.headings[1:])]))
    for index, row in enumerate(table.rows):
        lines.append(_line([f"**{cell}**" for cell in row] if index in table.best else row))
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show(table: Table) -> None:
    """Print a table to standard output."""
    try:
        from rich.console import Console
        from rich.table import Table as RichTable
    except ModuleNotFoundError:
        print(plain(table))
        return
    pretty = RichTable(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    for index, heading in enumerate(table.headings):
        pretty.add_column(heading, justify="right" if index else "left")
    for index, row in enumerate(table.marked()):
        pretty.add_row(*row, style="bold" if index in table.best else None)
    # Wide enough for every column in a log file too, where there is no terminal to ask.
    console = Console()
    Console(width=max(console.width, 120) if not console.is_terminal else None).print(pretty)


def plain(table: Table) -> str:
    """Return a table as aligned text."""
    lines = [table.headings, *table.marked()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.headings))]
    text = [table.title]
    for line in lines:
        first, *others = (cell.ljust if not column else cell.rjust for column, cell in enumerate(line))
        cells = [first(widths[0]), *(just(width) for just, width in zip(others, widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    return "\n".join([*text, *([table.note] if table.note else [])])


def track(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Yield items behind a progress bar on standard error; a line for each where there is no `rich`."""
    items = list(items)
    try:
        from rich.console import Console
        from rich.progress import track as bar
    except ModuleNotFoundError:
        for index, item in enumerate(items, 1):
            say(f"{what} {index}/{len(items)}")
            yield item
        return
    yield from bar(items, what, console=Console(stderr=True))


def say(message: str) -> None:
    """Print a message to standard error, where it does not mix with the tables."""
    print(message, file=sys.stderr, flush=True)


def microseconds(seconds: float) -> str:
    """Return a time as text, in µs, ms or s."""
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def mebibytes(amount: float) -> str:
    """Return a number of bytes as text, in MiB."""
    return f"{amount / 2**20:,.1f} MiB"
