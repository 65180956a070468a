"""Run a script of cases in two processes, and hand each case's outcome to the test that asks for it.

Starting two processes costs more than a case does, so the cases of one engine share a launch. A script calls `run` with
its cases; each is a function that returns what is to be checked, the same on every rank.
"""

from __future__ import annotations

import atexit
import datetime
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_GROUP_TIMEOUT = datetime.timedelta(seconds=60)

Case = Callable[[], dict[str, Any]]


def outcomes(script: str, ranks: int = 2, seconds: int = 400) -> tuple[dict[str, Any], ...]:
    """Launch a script with torchrun on loopback; return each rank's outcome of each case by name.

    A case that raised has {"error": its message}. A launch that fails is not tried again.
    """
    found = _launched(script, ranks, seconds)
    assert not isinstance(found, str), found
    return found


def torchrun(script: str, ranks: int) -> list[str]:
    """Return the command that launches a script of this folder on loopback."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", f"tests.distributed.{script}",
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a launch; two processes share two cores with whatever else is tested."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), **more}


@functools.cache
def _launched(script: str, ranks: int, seconds: int) -> tuple[dict[str, Any], ...] | str:
    """Launch once in a test run: the workers of pytest-xdist wait for each other's launches and share them."""
    shared = Path(tempfile.gettempdir(), f"mhc-outcomes-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
    folder = shared / f"{script}-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / "said"
        if not said.exists():
            said.write_text(_launch(script, ranks, seconds, folder))
            atexit.register(shutil.rmtree, shared, ignore_errors=True)
    if not all(file.exists() for file in files):
        return said.read_text()
    return tuple(json.loads(file.read_text()) for file in files)


def _launch(script: str, ranks: int, seconds: int, folder: Path) -> str:
    with subprocess.Popen(
        torchrun(script, ranks),
        env=environment(MHC_OUTCOMES=str(folder)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launched:
        try:
            return launched.communicate(timeout=seconds)[0][-4000:]
        except subprocess.TimeoutExpired:
            launched.terminate()  # torchrun ends its workers
            return f"{script} did not end within {seconds} seconds: {launched.communicate()[0][-4000:]}"


def run(cases: Mapping[str, Case]) -> None:
    """Run the cases in turn and write their outcomes; call it at the end of a script."""
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    wanted = sys.argv[1:] or list(cases)
    found: dict[str, Any] = {}
    for name in wanted:
        torch._dynamo.reset()
        try:
            found[name] = cases[name]()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        if "MHC_OUTCOMES" not in os.environ:
            short = {key: value for key, value in found[name].items() if key != "trace"}
            verbose = "MHC_TRACE" in os.environ
            print(f"{rank} {name}: {found[name] if verbose else short}", flush=True)
    if "MHC_OUTCOMES" in os.environ:
        Path(os.environ["MHC_OUTCOMES"], f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
