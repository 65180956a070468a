"""Run scripts of cases in two processes, and hand each case's outcome to the test that asks for it.

Starting two processes costs more than a case does, so the scripts share a launch (`together.py`). A script calls `run`
with its cases; each is a function that returns what is to be checked, the same on every rank.
"""

from __future__ import annotations

import atexit
import datetime
import fcntl
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
_GROUP_TIMEOUT = datetime.timedelta(seconds=60)
_SECONDS = 400
# The script that runs what needs two processes.
TOGETHER = "together"

Case = Callable[[], dict[str, Any]]


def outcomes(script: str, launch: str = TOGETHER, ranks: int = 2) -> tuple[dict[str, Any], ...]:
    """Return each rank's outcome of each of a script's cases by name, from a launch with torchrun on loopback.

    A case that raised has {"error": its message}. A launch that fails is not tried again.
    """
    found, said = _launched(launch, ranks)
    assert found, said[-4000:]
    return tuple(rank[script] for rank in found)


def output(launch: str = TOGETHER) -> str:
    """Return what two processes, and torchrun behind them, have printed."""
    return _launched(launch, 2)[1]


def _torchrun(script: str, ranks: int) -> list[str]:
    """Return the command that launches a script of this folder on loopback."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", f"tests.distributed.{script}",
    ]  # fmt: skip


@functools.cache
def _launched(script: str, ranks: int) -> tuple[tuple[dict[str, Any], ...], str]:
    """Launch once in a test run: the workers of pytest-xdist wait for each other's launches and share them."""
    shared = Path(tempfile.gettempdir(), f"mhc-outcomes-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}")
    folder = shared / f"{script}-{ranks}"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{rank}.json" for rank in range(ranks)]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = folder / "said"
        if not said.exists():
            said.write_text(_launch(script, ranks, folder))
            atexit.register(shutil.rmtree, shared, ignore_errors=True)
    found = [json.loads(file.read_text()) for file in files if file.exists()]
    return tuple(found) if len(found) == ranks else (), said.read_text()


def _launch(script: str, ranks: int, folder: Path) -> str:
    # These processes share two cores with whatever else is tested.
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT), "MHC_OUTCOMES": str(folder)}
    with subprocess.Popen(
        _torchrun(script, ranks),
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launched:
        try:
            said = launched.communicate(timeout=_SECONDS)[0]
            return f"{said}\n{script} ended with status {launched.returncode}"
        except subprocess.TimeoutExpired:
            launched.terminate()  # torchrun ends its workers
            return f"{launched.communicate()[0]}\n{script} did not end within {_SECONDS} seconds"


def run(last: Callable[[], Any] | None = None, **scripts: Mapping[str, Case]) -> None:
    """Run the cases of each script in turn and write their outcomes; call it at the end of a script.

    Args:
        last: what is called at the end, when the outcomes are written: it may fail.
        scripts: cases by the script's name; words on the command line choose some.
    """
    import torch
    import torch.distributed as dist

    # Tracing makes millions of small objects, and the default collects after every 700.
    gc.set_threshold(100_000, 50, 100)
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=_GROUP_TIMEOUT)
    found: dict[str, dict[str, Any]] = {script: {} for script in scripts}
    for script, cases in scripts.items():
        for name in [name for name in cases if name in (sys.argv[1:] or cases)]:
            torch._dynamo.reset()
            begin = time.monotonic()
            try:
                outcome = cases[name]()
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
            found[script][name] = outcome
            if "MHC_OUTCOMES" not in os.environ:
                short = {key: value for key, value in outcome.items() if key != "trace"}
                shown = outcome if "MHC_TRACE" in os.environ else short
                print(f"{rank} {script}, {name} ({time.monotonic() - begin:.1f} s): {shown}", flush=True)
    if "MHC_OUTCOMES" in os.environ:
        Path(os.environ["MHC_OUTCOMES"], f"{rank}.json").write_text(json.dumps(found))
    if last is not None:
        last()
    dist.barrier()
    dist.destroy_process_group()
