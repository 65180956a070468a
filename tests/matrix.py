"""Run the core tests on every supported PyTorch and Python: `make matrix`, or `python -m tests.matrix --only 2.11`.

Each combination gets a virtual environment of its own below `--folder`, with the newest transformers that installs
beside its PyTorch, and runs `CORE` on a copy of the working tree there. What came of it is written to
`tests/matrix.json` (combinations that were not run this time keep their entry) and, as a table, to `tests/matrix.md`.
Interpreters are looked for as `python3.10` and so on, along PATH and in pyenv's folder. Exit status 1 if a test failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, TABLE = ROOT / "tests" / "matrix.json", ROOT / "tests" / "matrix.md"
# Every PyTorch on one Python, and every Python on a PyTorch that has wheels for it.
COMBINATIONS = (
    ("2.11.0", "3.11"), ("2.12.1", "3.11"), ("2.13.0", "3.11"), ("2.14.1", "3.11"), ("2.15.0", "3.11"),
    ("2.11.0", "3.10"), ("2.14.1", "3.12"), ("2.15.0", "3.13"), ("2.15.0", "3.14"),
)  # fmt: skip
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REQUIREMENTS = ("transformers>=5.17", "accelerate", "peft", "expecttest", "hypothesis", "pytest", "pytest-xdist")
# One file for each way that the package leans on PyTorch: Dynamo's frames and guards, hooks, FX, operators and their
# autograd, AOT's partitioner, carried streams; and models of transformers.
CORE = (
    "tests/passes", "tests/planning", "tests/attachment", "tests/kernels/test_ops.py", "tests/kernels/test_anchored.py",
    "tests/test_preservation.py", "tests/test_oracle.py", "tests/test_composition.py", "tests/test_carried_streams.py",
    "tests/test_checkpointing.py", "tests/test_dynamic_shapes.py", "tests/test_errors.py", "tests/test_bad_input.py",
    "tests/test_kinds_of_models.py", "tests/test_packaging.py",
)  # fmt: skip


def interpreter(version: str) -> str | None:
    """Return a Python of this version, None if there is none."""
    found = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    known = sorted(pyenv.glob(f"{version}.*/bin/python")) if found is None or "shims" in found else []
    return str(known[-1]) if known else found


def environment(folder: Path, torch: str, python: str) -> tuple[Path | None, str]:
    """Return the Python of a combination's virtual environment, or None and why there is none."""
    base = interpreter(python)
    if base is None:
        return None, f"no Python {python} here"
    place = folder / f"torch-{torch}-python-{python}"
    inside = place / "bin" / "python"
    if (place / "ready").exists():
        return inside, ""
    install = [str(inside), "-m", "pip", "install", "-q"]
    for command in (
        [base, "-m", "venv", "--clear", str(place)],
        # The CPU's wheel where that index can be reached; PyPI's otherwise, which brings the CUDA libraries.
        [*install, f"torch=={torch}", *REQUIREMENTS, "--extra-index-url", CPU_INDEX],
        [*install, "--no-deps", str(ROOT)],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return None, (errors or done.stderr.splitlines() or ["installation failed"])[0]
    (place / "ready").touch()
    return inside, ""


def run(folder: Path, torch: str, python: str, tests: tuple[str, ...], workers: int) -> dict[str, Any]:
    """Run the tests of one combination and return what the table shows."""
    record: dict[str, Any] = {"torch": torch, "python": python}
    inside, why = environment(folder, torch, python)
    if inside is None:
        return {**record, "not run": why}
    tree = folder / "tree"
    copy_tree(tree)
    ask = "import torch, transformers, triton; print(torch.__version__, transformers.__version__, triton.__version__)"
    versions = subprocess.run([str(inside), "-c", ask], capture_output=True, text=True)
    if versions.returncode:
        return {**record, "not run": (versions.stderr.strip().splitlines() or ["torch does not import"])[-1]}
    record |= dict(zip(("torch", "transformers", "triton"), versions.stdout.split(), strict=True))
    command = [str(inside), "-m", "pytest", "-n", str(workers), "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    closing = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", closing)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return {**record, **counts, "failures": failed, "date": datetime.date.today().isoformat()}


def copy_tree(target: Path) -> None:
    """Copy the working tree, laid as the package imports: what is installed is not what runs."""
    shutil.rmtree(target, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    for room in ("passes", "kernels"):
        (target / "mhc_compile" / room).symlink_to(Path("..") / room)


def table(records: list[dict[str, Any]]) -> str:
    """Return the results as Markdown."""
    lines = ["| PyTorch | Python | transformers | Triton | result |", "|---|---|---|---|---|"]
    for record in records:
        if "not run" in record:
            result = f"not run: {record['not run']}"
        else:
            bad = record.get("failed", 0) + record.get("error", 0)
            result = f"{record.get('passed', 0)} passed" + (f", **{bad} failed**" if bad else "")
            result += f", {record['skipped']} skipped" if record.get("skipped") else ""
            result += f" ({record['date']})"
        cells = (record["torch"], record["python"], record.get("transformers", ""), record.get("triton", ""), result)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the combinations asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "matrix", help="where the environments go")
    parser.add_argument("--only", default="", help="a regular expression over 'torch VERSION python VERSION'")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("tests", nargs="*", default=CORE, help="other tests than the core ones")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    kept = {(entry["torch"].split("+")[0], entry["python"]): entry for entry in known}
    ran = []
    for torch, python in COMBINATIONS:
        if not re.search(arguments.only, f"torch {torch} python {python}"):
            continue
        record = run(arguments.folder, torch, python, tuple(arguments.tests), arguments.workers)
        ran.append(record)
        kept[torch, python] = record
        print(json.dumps(record, indent=1), flush=True)
    records = [kept[combination] for combination in COMBINATIONS if combination in kept]
    RESULTS.write_text(json.dumps(records, indent=1) + "\n")
    TABLE.write_text(table(records))
    return int(any(record.get("failures") for record in ran))


if __name__ == "__main__":
    sys.exit(main())
