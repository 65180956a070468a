"""The kernel benchmark checks what it measures, says what is wrong, and divides by the least traffic."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mhc_compile.kernels import dispatch
from mhc_compile.kernels.gpu import measure

from benchmarks import checks, implementations, kernels, kernels_report, problems, timing
from benchmarks.problems import OPERATORS, Shape
from benchmarks.record import Options, Record

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shape():
    return Shape("post", 3, 4, 40, torch.bfloat16)


def wrong(monkeypatch, name, factor=1.02):
    right = OPERATORS[name]
    broken = dataclasses.replace(right, forward=lambda *tensors: right.forward(*tensors) * factor)
    monkeypatch.setitem(OPERATORS, name, broken)


def test_a_wrong_kernel_is_reported(shape, monkeypatch):
    assert problems.check(shape, "cpu") == []
    wrong(monkeypatch, "post")
    (problem,) = problems.check(shape, "cpu")
    assert "forward, output 0 errs by" in problem


def test_a_result_that_is_not_a_number_is_wrong(shape, monkeypatch):
    wrong(monkeypatch, "post", float("nan"))
    assert problems.check(shape, "cpu")


def test_the_check_sees_phi_in_one_piece(monkeypatch):
    project = measure.project
    monkeypatch.setattr(dispatch, "prepared_kernel_of", dispatch.kernel_of)
    shape = Shape("pre", 40, 4, 64, torch.bfloat16)
    with dispatch.choosing("triton"):
        assert problems.check(shape, "cpu") == []
        monkeypatch.setattr(
            measure,
            "project",
            lambda streams, phi, *rest, **how: project(streams, phi.bfloat16().float(), *rest, **how),
        )
        found = problems.check(shape, "cpu")
    assert any("forward, output 2 errs by" in problem for problem in found)


def measured(monkeypatch, tmp_path, operators):
    """Run the benchmark on small shapes and return what it wrote."""
    shapes = [Shape(name, 3, 4, 40, torch.bfloat16) for name in operators]
    monkeypatch.setattr(kernels, "shapes_to_measure", lambda quick, device: shapes)
    record = Record("kernels", tmp_path / "kernels.json")
    kernels.run(Options("cpu", quick=True), record)
    record.content["environment"] = {"device": "cpu"}
    return record.content


def test_what_fails_its_check_is_measured_and_flagged(monkeypatch, tmp_path):
    wrong(monkeypatch, "post")
    content = measured(monkeypatch, tmp_path, ["post", "head"])
    rows = {(row["operator"], row["implementation"]): row for row in content["rows"]}
    assert "output 0 errs by" in rows["post", "kernel"]["problems"][0]
    assert rows["post", "kernel"]["forward_seconds"] > 0
    assert rows["head", "kernel"]["problems"] == rows["post", "inductor"]["problems"] == []
    assert [entry["case"] for entry in content["failures"]] == ["post, 3 tokens, n=4, C=40, bfloat16, kernel"]
    (table,) = kernels_report.tables(content)
    assert [row[1] for row in table.rows] == ["kernel ✗", "inductor", "kernel"]
    # The best of a group is one that is right.
    assert table.best == frozenset((1,))


def test_a_graph_that_cannot_be_captured_is_reported(monkeypatch, tmp_path):
    def refuse(calls, repeats):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(kernels, "graph_seconds", refuse)
    monkeypatch.setattr(kernels, "captured", lambda shape, device: True)
    content = measured(monkeypatch, tmp_path, ["head"])
    assert content["rows"][0]["graph_error"] == "RuntimeError: operation not permitted when stream is capturing"
    (entry,) = content["failures"]
    assert entry["case"].endswith("kernel, captured by a CUDA graph")


def test_what_is_compiled_while_it_is_timed_is_an_error():
    calls = []

    def call():
        calls.append(torch.compile(lambda value: value + len(calls), backend="eager")(torch.ones(2)))

    with pytest.raises(timing.CompiledWhileTimedError):
        timing.median_seconds([call], "cpu", 2)
    torch._dynamo.reset()
    assert timing.median_seconds([lambda: torch.ones(2) + 1], "cpu", 2) > 0


def test_checks_write_a_row_for_each_group_and_what_is_wrong_with_it(monkeypatch, tmp_path):
    wrong(monkeypatch, "post")
    shapes = [Shape(name, tokens, 4, 40, torch.bfloat16) for name in ("post", "head") for tokens in (1, 3)]
    monkeypatch.setattr(checks, "shapes_to_check", lambda quick, device: shapes)
    record = Record("checks", tmp_path / "checks.json")
    checks.run(Options("cpu", quick=True), record)
    assert [(row["operator"], row["tokens"], len(row["problems"])) for row in record.content["rows"]] == [
        ("post", [1, 3], 2), ("head", [1, 3], 0),
    ]  # fmt: skip
    assert [entry["case"] for entry in record.content["failures"]] == ["post, n=4, C=40, bfloat16"]
    (table,) = checks.tables(record.content)
    assert table.rows == (("post", "0 of 1"), ("head", "1 of 1"))


PROGRAM = """
import json, sys
import torch
from benchmarks import compile_ahead, precompile
from benchmarks.problems import Shape

if __name__ == "__main__":
    shapes = [Shape("post", 64, 2, 32, torch.float32), Shape("post", 8, 2, 32, torch.float32)]
    target = compile_ahead.TARGETS[1].gpu
    precompile.precompile(shapes, target, 1)
    # Now from the cache: compiling anything would be an error.
    compile_ahead.triton.runtime.driver.set_active(compile_ahead._Driver(compile_ahead.TARGETS[1]))
    import triton.compiler.compiler as compiler
    compiler.ASTSource.make_ir = None
    for kernel, args, options in precompile.distinct(shapes, "cuda"):
        kernel.warmup(*args, grid=(1,), **options)
    print(json.dumps(len(precompile.distinct(shapes, "cuda"))))
"""


def test_kernels_are_compiled_before_they_run(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {
        **os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache"),
    }  # fmt: skip
    run = subprocess.run([sys.executable, str(program)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    # Two token counts share their kernels, forward and backward.
    assert run.stdout.splitlines()[-1] == "2"


@pytest.mark.parametrize("name", ["boundary", "site", "paper"])
def test_every_fusion_implements_a_boundary(name):
    shape = Shape("post_pre", 5, 4, 24, torch.bfloat16)
    assert implementations.problems_of(implementations.implementations_of("post_pre")[name], shape, "cpu") == []


def test_an_implementation_with_a_wrong_gradient_is_reported():
    def detached(streams, branch, post, res):
        return OPERATORS["post"].forward(streams, branch, post, res.detach() + 0.0 * res)

    found = implementations.problems_of(detached, Shape("post", 5, 4, 24, torch.float32), "cpu")
    assert [problem.split(" errs")[0] for problem in found] == ["gradient 3"]


def test_least_traffic():
    # Ten tokens of 100 channels in bfloat16, and in float32 20 coefficients a token and phi [24, 400]: (2n + 2) rows
    # forward and (3n + 3) backward for a boundary, coefficients in and out (and their gradients), 25 floats of the
    # projection, phi and its gradient.
    boundary = Shape("post_pre", 10, 4, 100, torch.bfloat16)
    phi = 24 * 400 * 4
    assert boundary.traffic(False) == 10 * (10 * 100 * 2 + (2 * 20 + 25) * 4) + phi
    assert boundary.traffic(True) == 10 * (15 * 100 * 2 + (3 * 20 + 25) * 4) + 2 * phi
    alone = Shape("sinkhorn", 10, 4, 1, torch.float32)
    assert alone.traffic(False) == 10 * 2 * 16 * 4
