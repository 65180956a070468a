"""What is timed beside ours computes what it should, and what does not is flagged."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import hand_written, peer_steps
from benchmarks.record import Options, Record


def test_another_function_is_flagged_and_a_missing_package_named(tmp_path):
    plain, ours, peer, *_ = hand_written.WRITINGS

    def other(width, layers):
        model = hand_written.Plain(width, layers)
        torch.nn.init.ones_(model.branches[0].output.weight)
        return model

    wrong = replace(ours, name="wrong", build=other)
    record = Record("peer_steps", tmp_path / "peer_steps.json")
    writings = (plain, ours, wrong, replace(peer, module="no_such_package"))
    peer_steps.measure_width(16, writings, Options("cpu", quick=True), record)
    found = record.content
    assert [bool(row["problems"]) for row in found["rows"]] == [False, False, True]
    assert found["skipped"] == [
        {"case": "hyper-connections, C=16", "why": "not installed (pip install no-such-package)"}
    ]
    (table,) = peer_steps.tables(found)
    assert len(table.rows) == 3
    assert table.best == {1}
