"""The package as installed: names, entry points, import cost, wheel."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_transformers_imports_beside_the_repository_root():
    """Its `kernels` would be taken for Hugging Face's package of that name, if it lay there as one."""
    assert str(ROOT) in sys.path
    from transformers import LlamaForCausalLM

    assert LlamaForCausalLM.__module__.startswith("transformers.")


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What a fresh process prints: `torch._dynamo.reset()`, which tests call, drops the callback that notices."""
    folder = tmp_path_factory.mktemp("fresh")
    script = folder / "breaks.py"
    script.write_text(
        "import torch, sys\n"
        "print([m for m in sys.modules if m.startswith('mhc_compile')])\n"
        "class Model(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))\n"
        "    def forward(self, hidden):\n"
        "        for index, layer in enumerate(self.layers):\n"
        "            hidden = hidden + torch.tanh(layer(hidden))\n"
        "            if index == 1:\n"
        "                torch._dynamo.graph_break()\n"
        "        return hidden\n"
        "model = Model()\n"
        "try:\n"
        "    torch.compile(model, backend='mhc')(torch.ones(2, 8))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "model(torch.ones(2, 8))\n"
        "print([len(module._forward_pre_hooks) for module in model.modules()])\n"
        "print(torch._dynamo.list_backends())\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_backend_is_found_by_name_and_not_imported_with_torch(said):
    imported, *_, backends = said
    assert "mhc_compile.logs" in imported
    assert "backend" not in imported
    assert "passes" not in imported
    assert "'mhc'" in backends


def test_a_first_call_with_a_break_in_a_loop_is_noticed(said):
    assert said[1].startswith("StreamCutError"), said
    assert "breaks.py:11" in "\n".join(said)
    assert said[-2] == "[0, 0, 0, 0, 0]"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q", "-w", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_only_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mhc_compile"}
    assert {name for name in names if name.startswith("mhc_compile/")} == _files_of_the_package()


def _files_of_the_package():
    """What git tracks of the three rooms, as it is installed."""
    rooms = ("mhc_compile", "passes", "kernels")
    tracked = subprocess.run(["git", "ls-files", *rooms], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return {name if name.startswith("mhc_compile/") else f"mhc_compile/{name}" for name in tracked.split()}


def test_the_repository_root_is_as_designed():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    folders = {name.split("/")[0] for name in tracked if "/" in name}
    assert {name for name in folders if not name.startswith(".")} == {
        "mhc_compile", "passes", "kernels", "tests", "benchmarks",
    }  # fmt: skip
