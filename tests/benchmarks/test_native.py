"""The benchmark of models that carry streams: cases measured a few at a time, and those that are stopped."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace

from benchmarks import native, record
from benchmarks.record import Options

MEASURED = {
    "compile_seconds": 90.0, "analyze_seconds": 1.0, "graph_nodes": 10, "aten_nodes": 20, "launches_per_site": 3.0,
    "eager_launches_per_site": 142.0, "step_seconds": 0.1, "infinite_gradients": 0,
}  # fmt: skip


def test_a_stopped_case_is_a_row_and_what_was_measured_before_is_kept(tmp_path, monkeypatch):
    def compile_in_process(case, inner, options, cache):
        if case.compiler == native.INDUCTOR:
            raise subprocess.TimeoutExpired("native_child", case.limit)
        return MEASURED

    monkeypatch.setattr(native, "compile_in_process", compile_in_process)
    monkeypatch.setattr(native, "missing", lambda: None)
    options = Options("cpu", out=tmp_path)
    for name in ("boundary/43", "inductor/43"):
        assert record.execute(native.BENCHMARK, replace(options, only=(name,))) == 0
    (path,) = tmp_path.glob("*/native.json")
    result = json.loads(path.read_text())
    assert [row["compiler"] for row in result["rows"]] == ["boundary", "inductor"]
    assert result["complete"]
    (table,) = native.tables(result)
    assert [cells[2] for cells in table.rows] == ["90.0 s", "> 150 s"]
    assert "eagerly 142" in table.note
    # Of another commit nothing is kept.
    path.write_text(json.dumps({**result, "environment": {"commit": "another"}}))
    record.execute(native.BENCHMARK, replace(options, only=("boundary/43",)))
    assert [row["compiler"] for row in json.loads(path.read_text())["rows"]] == ["boundary"]
