"""Run a script of cases in two processes, and hand each case's outcome to the test that asks for it.

Starting two processes costs more than a case does, so the cases of one engine share a launch. A script calls `run` with
its cases; each is a function that returns what is to be checked, the same on every rank.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
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


@functools.cache
def outcomes(script: str, ranks: int = 2, seconds: int = 240) -> tuple[dict[str, Any], ...]:
    """Launch a script with torchrun on loopback; return each rank's outcome of each case by name.

    A case that raised has {"error": its message}.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", f"tests.distributed.{script}",
        ]  # fmt: skip
        environment = {**os.environ, "MHC_OUTCOMES": folder, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        files = [Path(folder, f"{rank}.json") for rank in range(ranks)]
        assert all(file.exists() for file in files), done.stderr[-4000:]
        return tuple(json.loads(file.read_text()) for file in files)


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
