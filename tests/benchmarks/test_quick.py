"""`python -m benchmarks all --quick` works here, and leaves complete results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import report, suite

ROOT = Path(__file__).parents[2]


def test_everything_runs_and_its_results_become_a_page(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "all",
        "--device",
        "cpu",
        "--quick",
        "--out",
        str(tmp_path / "results"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    paths = sorted((tmp_path / "results").glob("*/*.json"))
    run = sorted(part.name for part in suite.parts_of(None, "cpu"))
    assert [path.stem for path in paths] == run
    # It takes an hour, and a pretrained model.
    assert {*report.MODULES} - {*run} == {"upcycle"}
    for path in paths:
        result = json.loads(path.read_text())
        assert result["complete"], path
        assert result["failures"] == [], path
        # Quick runs never reach the page of results; here they stand in for full ones.
        path.write_text(json.dumps({**result, "quick": False}))
    page = report.rebuild(tmp_path).read_text()
    for benchmark in report.benchmarks():
        assert (f"### {benchmark.title}" in page) == (benchmark.name in run)
    for figure in ("stability-gain.png", "stability-training.png", "kernels-share.png", "training-overhead.png"):
        assert f"/{figure})" in page
        assert next((tmp_path / "results").glob(f"*/{figure}")).stat().st_size > 5000
