"""What is timed beside ours computes what it should, and what does not is flagged."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import hand_written, peer_steps
from benchmarks.record import Options, Record

QUICK = Options("cpu", quick=True)


def measured(tmp_path, monkeypatch, *writings):
    monkeypatch.setattr(peer_steps, "WRITINGS", writings)
    record = Record("peer_steps", tmp_path / "peer_steps.json")
    peer_steps.measure_width(16, QUICK, record)
    return record.content


def test_another_function_is_flagged_and_a_missing_package_named(tmp_path, monkeypatch):
    plain, ours, peer, *_ = hand_written.WRITINGS

    def other(width, layers):
        model = hand_written.Plain(width, layers)
        torch.nn.init.ones_(model.branches[0].output.weight)
        return model

    wrong = replace(ours, name="wrong", build=other)
    found = measured(tmp_path, monkeypatch, plain, ours, wrong, replace(peer, module="no_such_package"))
    assert [bool(row["problems"]) for row in found["rows"]] == [False, False, True]
    assert found["skipped"] == [
        {"case": "hyper-connections, C=16", "why": "not installed (pip install no-such-package)"}
    ]
    (table,) = peer_steps.tables(found)
    assert len(table.rows) == 3
    assert table.best == {1}
