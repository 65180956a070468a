"""The overlap benchmark: what a row says of steps whose times are known."""

from __future__ import annotations

import pytest

from benchmarks import overlap
from benchmarks.record import Record

# 1F1B on two ranks, two microbatches, forward 1 s and backward 2 s: 9 s, and 10.5 s where a send takes half a second.
SIZE = overlap.Size(width=4, blocks=2, length=8, microbatches=2, forward=1.0, transfers=(0.5,), turns=2)


def step(bandwidth: float | None, rank: int, seconds: float) -> dict[str, object]:
    computed = [("F", rank, 0, 100.0, 101.0, 0.25), ("B", rank, 0, 102.0, 104.0, 0.5)]
    sent = [(4 * SIZE.length * SIZE.width, 101.0, 101.5)]
    return {"bandwidth": bandwidth, "begin": 100.0, "end": 100.0 + seconds, "computed": computed, "sent": sent}


def test_what_is_exposed_hidden_and_predicted(tmp_path):
    (link,) = SIZE.bandwidths
    steps = ((None, 9.0), (link, 9.75), (None, 9.5), (link, 10.25))
    seen = [[step(bandwidth, rank, seconds) for bandwidth, seconds in steps] for rank in range(2)]
    record = Record("overlap", tmp_path / "overlap.json")
    overlap._keep(record, SIZE, "plain", "1F1B", seen)
    row, timeline = record.content["rows"]
    assert (row["transfer"], row["sends"], row["exposed"]) == (0.5, 2, 0.75)
    assert row["hidden"] == pytest.approx(0.25)
    assert row["predicted"] == pytest.approx(1.5)
    assert row["computed"] == {"B": 0.5, "F": 0.25}
    assert timeline["ranks"][0]["computed"][0] == ["F", 0, 0, 0.0, 1000.0]
    record.content["facts"] = {"microbatches": 2, "ranks": 2, "blocks": 2, "forward": 1.0}
    assert [len(table.rows) for table in overlap.tables(record.content)] == [1, 1]
