"""Compiling: once, for this machine, into a folder that is there; and what happens where it cannot be done."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mhc_compile.kernels import dispatch, ops
from mhc_compile.kernels.costs.fusion_choice import FusionReason, choose_fusion
from mhc_compile.kernels.cpu import build
from mhc_compile.kernels.dispatch import choosing, compiled_of, implementation

from mhc_compile import functional
from tests.kernels.problems import Problem, check, inputs


@pytest.fixture
def fresh(monkeypatch, tmp_path) -> Path:
    """Nothing is compiled or loaded yet; returns the folder that it will be compiled into."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "mhc_compile"
    build.library.cache_clear()


@pytest.fixture
def no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")


@pytest.fixture
def no_compiled_call(monkeypatch):
    def refuse(name):
        raise AssertionError(f"the compiled {name} was called")

    monkeypatch.setattr(dispatch, "compiled_of", refuse)


STREAMS = (torch.zeros(1, 2, 4),)


@pytest.mark.usefixtures("no_compiler", "no_compiled_call")
def test_without_a_compiler_plain_pytorch_runs_and_the_report_says_so():
    assert implementation(STREAMS, 2) == "reference"
    assert functional.sinkhorn(torch.zeros(3, 2, 2)).eq(0.5).all()
    choice = choose_fusion(64, 8, 2, torch.float32, "cpu")
    assert (choice.fusion, choice.reason) == ("site", FusionReason.PLAIN_PYTORCH)
    assert "no C++ compiler found" in str(choice)
    with choosing("cpu"), pytest.raises(build.BuildError, match=r"no C\+\+ compiler found.*MHC_KERNELS=auto"):
        functional.sinkhorn(torch.zeros(3, 2, 2))


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'the license has expired' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert implementation(STREAMS, 2) == "reference"
    assert str(broken) in build.why_not(2, torch.float32)
    assert "the license has expired" in build.why_not(2, torch.float32)


@pytest.mark.usefixtures("compiled")
def test_it_is_compiled_once_and_found_again(fresh, monkeypatch):
    assert build.why_not(1, torch.float32) is None
    (made,) = fresh.glob("*.so")
    assert made.name.startswith("mhc_1_float32_")
    build.library.cache_clear()
    monkeypatch.setattr(build, "_compile", None)
    assert build.why_not(1, torch.float32) is None
    # Other sources make another library.
    assert build._key(build.compiler(), ("-O3",)) != build._key(build.compiler(), ("-O2",))


@pytest.mark.usefixtures("compiled")
def test_a_folder_that_cannot_be_written_is_no_obstacle(fresh, monkeypatch, tmp_path):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(file / "below"))
    assert build.why_not(1, torch.float32) is None


@pytest.mark.usefixtures("compiled")
def test_a_library_that_is_cut_short_is_compiled_again(fresh):
    # Not loaded yet: the linker would not read a file again that lies where a loaded one was.
    made = build._compiled(1, torch.float32)
    assert made.is_relative_to(fresh)
    whole = made.read_bytes()
    made.write_bytes(whole[:100])
    assert build.why_not(1, torch.float32) is None
    assert made.stat().st_size == len(whole)


@pytest.mark.usefixtures("compiled")
def test_a_full_disk_leaves_plain_pytorch(fresh, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build.os, "replace", full)
    assert implementation(STREAMS, 1) == "reference"
    assert "No space left on device" in build.why_not(1, torch.float32)


@pytest.mark.usefixtures("compiled")
def test_processes_that_start_together_share_one_library(fresh):
    program = (
        "import torch\n"
        "from mhc_compile import functional\n"
        "assert functional.sinkhorn(torch.zeros(3, 1, 1)).eq(1).all()\n"
    )
    environment = {**os.environ, "MHC_KERNELS": "cpu"}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert len(list(fresh.glob("mhc_1_float32_*"))) == 1


@pytest.mark.usefixtures("compiled")
def test_the_choice_of_an_implementation():
    assert implementation(STREAMS, 2) == "cpu"
    assert implementation((torch.zeros(1, 2, 4, dtype=torch.float64),), 2) == "reference"
    assert implementation((torch.zeros(1, 9, 4),), 9) == "reference"
    assert implementation(STREAMS, 2, "a manifold of a user") == "reference"
    assert implementation((STREAMS[0].to("meta"),), 2) == "reference"
    for choice in ("cpu", "reference"):
        with choosing(choice):
            assert implementation(STREAMS, 2) == choice
            assert implementation(STREAMS, 2, device=torch.device("cuda")) == "reference"


@pytest.mark.usefixtures("compiled")
def test_the_choice_of_a_fusion():
    choice = choose_fusion(64, 8, 2, torch.float32, "cpu")
    assert (choice.fusion, choice.reason) == ("site", FusionReason.COMPILED)
    assert choose_fusion(64, 8, 2, torch.float64, "cpu").reason is FusionReason.PLAIN_PYTORCH
    with choosing("reference"):
        assert choose_fusion(64, 8, 2, torch.float32, "cpu").reason is FusionReason.PLAIN_PYTORCH


@pytest.mark.usefixtures("compiled")
def test_operators_call_what_was_compiled(monkeypatch):
    called = []
    monkeypatch.setattr(dispatch, "compiled_of", lambda name: called.append(name) or compiled_of(name))
    streams = inputs("pre", Problem(3, 4, 8))
    tensors, constants = streams
    tensors[0].requires_grad_()
    sum(out.sum() for out in ops.pre(*tensors, *constants)).backward()
    assert called == ["pre", "pre_backward"]


# What a machine without AVX-512, or without AVX, compiles: vectors of 8 and of 4.
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64"])
def test_narrower_vectors(fresh, monkeypatch, target):
    if build.platform.machine() != "x86_64":
        pytest.skip("instruction sets of x86-64")
    if target == "x86-64-v3" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this processor has no AVX2")
    monkeypatch.setattr(build, "_native", lambda: f"-march={target}")
    for n, dtype in ((4, torch.float32), (3, torch.bfloat16)):
        for operator in ("sinkhorn", "pre", "post", "post_pre", "head"):
            check(operator, Problem(37, n, 72, dtype), function_of=compiled_of)
