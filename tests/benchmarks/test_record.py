"""Results survive a run that is stopped, tables print without rich, and the page is rebuilt from JSON alone."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import time

import pytest

from benchmarks import counted, environment, record, report, suite, terminal
from benchmarks.record import Benchmark, Options, Record
from benchmarks.terminal import Table

TABLE = Table("title", ("name", "value"), (("first", "1"), ("second", "22")), frozenset((1,)), "A note.")


def benchmark_of(run):
    return Benchmark("kernels", "Kernels", run, lambda result: [TABLE] if result["rows"] else [])


def written(folder, name="kernels"):
    (path,) = folder.glob(f"*/{name}.json")
    return json.loads(path.read_text())


def test_a_killed_run_leaves_what_it_had(tmp_path):
    def run(options, kept):
        kept.add(value=1)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        record.execute(benchmark_of(run), Options("cpu", out=tmp_path))
    result = written(tmp_path)
    assert result["rows"] == [{"value": 1}]
    assert result["complete"] is False
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".json"]


def test_a_run_out_of_time_is_not_complete(tmp_path):
    def run(options, kept):
        for value in range(3):
            if record.in_time(options, kept, f"case {value}"):
                kept.add(value=value)

    assert record.execute(benchmark_of(run), Options("cpu", out=tmp_path, deadline=time.monotonic() - 1.0)) == 0
    result = written(tmp_path)
    assert (result["rows"], result["complete"]) == ([], False)
    assert [entry["why"] for entry in result["skipped"]] == [record.OUT_OF_TIME] * 3


def test_a_failed_check_is_the_exit_status(tmp_path):
    assert record.execute(benchmark_of(lambda options, kept: kept.fail("a", "b")), Options("cpu", out=tmp_path)) == 1
    assert written(tmp_path)["complete"] is True


def test_a_child_is_its_last_line_its_error_or_out_of_time(tmp_path, monkeypatch):
    program = """
    import json, os, sys, time
    print("noise")
    if sys.argv[1] == "fail":
        sys.exit("first line\\nwhat went wrong")
    if sys.argv[1] == "wait":
        time.sleep(60)
    print(json.dumps({"cache": os.environ.get("TRITON_CACHE_DIR")}))
    """
    (tmp_path / "kept_child.py").write_text(textwrap.dedent(program))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "the user's")
    assert record.run_child("kept_child", "end", limit=float("inf")) == {"cache": "the user's"}
    assert record.run_child("kept_child", "end", limit=60.0, cache="mine") == {"cache": "mine/triton"}
    with pytest.raises(RuntimeError, match=r"\Awhat went wrong\Z"):
        record.run_child("kept_child", "fail", limit=60.0)
    with pytest.raises(subprocess.TimeoutExpired):
        record.run_child("kept_child", "wait", limit=0.1)


def test_the_environment_names_hardware_and_versions():
    found = environment.environment("cpu")
    assert found["hardware"].endswith("CPU only")
    assert found["gpu"] is None
    assert {"python", "torch"} <= found["versions"].keys()
    assert environment.slug("NVIDIA H200, 2 (x)") == "nvidia-h200-2-x"


@pytest.mark.parametrize("module", ["rich.console", "rich.table", "rich.progress"])
def test_everything_prints_without_rich(module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    terminal.show(TABLE)
    assert list(terminal.track([1, 2], "counting")) == [1, 2]
    shown = capsys.readouterr()
    assert "second ◀ best" in shown.out
    assert "A note." in shown.out


def test_plain_and_markdown_tables():
    assert terminal.plain(TABLE).splitlines() == [
        "title",
        "name           value",
        "first              1",
        "second ◀ best     22",
        "A note.",
    ]
    assert "| **second** | **22** |" in terminal.markdown(TABLE)
    with pytest.raises(ValueError, match="1 cells under 2 headings"):
        Table("title", ("a", "b"), (("1",),))


def test_the_page_comes_from_json_and_does_not_mix_hardware(tmp_path, monkeypatch):
    monkeypatch.setattr(report.figures, "available", lambda: False)
    results = tmp_path / "results"
    for device, hardware, quick in (("cpu", "A, CPU only", False), ("cuda", "B", False), ("cpu", "C", True)):
        kept = Record("stability", results / environment.slug(hardware) / "stability.json")
        kept.content = {
            "benchmark": "stability", "quick": quick, "note": "a busy machine", "complete": False, "started": "today",
            "environment": {**environment.environment("cpu"), "device": device, "hardware": hardware, "load": 9.0},
            "facts": {}, "rows": [], "failures": [],
            "skipped": [{"case": "x", "why": "out of time"}, {"case": "y", "why": "out of time"}],
        }  # fmt: skip
        kept.write()
    page = report.rebuild(tmp_path).read_text()
    assert page.index("## B") < page.index("## A, CPU only")
    assert "## C" not in page
    assert page.count("No GPU: these results") == 1
    for sentence in ("a busy machine.", "Stopped early", "a load of up to 9", "- x; y: out of time"):
        assert page.count(sentence) == 2, sentence
    assert report.rebuild(tmp_path).read_text() == page


def test_no_results_are_an_error_that_names_the_way_out(tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(SystemExit, match="benchmarks all"):
        report.rebuild(tmp_path)


@pytest.mark.parametrize("text", ["", '{"quick": fal', "[]", '{"benchmark": "kernels"}'])
def test_a_result_that_is_broken_is_named(tmp_path, text):
    place = tmp_path / "results" / "cpu"
    place.mkdir(parents=True)
    (place / "kernels.json").write_text(text)
    with pytest.raises(SystemExit, match=r"kernels\.json is no result"):
        report.rebuild(tmp_path)


def test_a_part_that_hangs_is_stopped_and_the_next_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "_START_SECONDS", 0.1)
    monkeypatch.setattr(suite, "_GRACE_SECONDS", 0.1)
    monkeypatch.setattr(suite, "_CPU_PARTS", (suite.Part("hangs", 0.1), suite.Part("ends", 0.5)))
    ran = tmp_path / "ran"
    programs = {"hangs": "import time; time.sleep(60)", "ends": f"open({str(ran)!r}, 'w').close()"}
    monkeypatch.setattr(suite, "command", lambda part, *rest: [sys.executable, "-c", programs[part.name]])
    begin = time.monotonic()
    assert suite.run_all(Options("cpu", deadline=begin + 20.0)) == 1
    assert ran.exists()
    assert time.monotonic() - begin < 20.0


def test_a_part_gets_the_options_and_its_share_of_the_time(tmp_path):
    options = Options("cpu", quick=True, out=tmp_path, note="busy")
    line = suite.command(suite.Part("peers", 0.5, ("liger-kernel",)), options, 90.0)
    assert line[1:3] == ["-m", "benchmarks.peers"]
    for pair in (("--device", "cpu"), ("--minutes", "1.500"), ("--note", "busy"), ("--only", "liger-kernel")):
        assert line[line.index(pair[0]) + 1] == pair[1]
    assert "--quick" in line


def test_three_calls_are_what_a_lent_machine_runs():
    ran = {call: [part.name for part in suite.parts_of(call, "cuda")] for call in suite.CALLS}
    assert ran == {"checks": ["checks"], "speed": ["kernels", "peers"], "training": ["training_step"]}
    assert suite.CALL_MINUTES < 10
    assert suite.parts_of(None, "cuda") is suite._GPU_PARTS


def test_rows_of_another_commit_stay_beside_those_of_this_one(tmp_path):
    def keep(label, *rows, identity=0):
        given = argparse.Namespace(label=label, out=tmp_path / counted.FOLDER)
        counted.keep("numbers", Table("title", ("name", "value"), rows, note="n"), given, identity)
        (table,) = counted.tables(tmp_path)
        return [(row[0], *row[2:]) for row in table.rows]

    keep("before", ("a", "1"), ("b", "2"))
    both = keep("after", ("a", "3"))
    assert both == [("before", "a", "1"), ("before", "b", "2"), ("after", "a", "3")]
    assert keep("after", ("c", "4"), identity=1) == [*both, ("after", "c", "4")]
    # What was before comes first, whenever it was kept.
    assert keep("before", ("a", "5")) == [("before", "a", "5"), *both[2:], ("after", "c", "4")]
