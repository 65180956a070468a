"""Compare every architecture of a model zoo with the oracle: `python -m tests.zoo_oracle --zoo PATH`.

PATH is a folder with a `zoo.py` whose `build(name)` returns (name, family, model, inputs by name, info) and an
`expected.json` whose keys are the names. For each: attach, add 0.3·randn to every mHC parameter, and compare the
compiled model with `tests.oracle`, both in float64 where the model runs in it (so that a difference is a wrong rewrite
and no rounding), else in float32. Outputs to 1e-5, every gradient to 1e-4. Each architecture runs in its own process.
Exit status 1 if one differs or fails.

With `--json` each record is written as soon as it is there, into what the file holds already: a run of a part of the
zoo replaces the records of that part. `--resume` leaves out what is in the file, `--minutes` begins nothing further
after so many.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

OUT, GRADIENT = 1e-5, 1e-4
# One of these for each architecture, by its name, so that the zoo as a whole sees all of them.
CHOICES = list(
    product(
        (("boundary", "auto"), ("site", 1), ("inductor", "none"), ("paper", 2)),
        ("sinkhorn", "identity", "none"),
        (4, 2, 3),
        ("mean", "learned"),
    )
)


def run_one(zoo_path: Path, name: str) -> dict[str, object]:
    """Compare one architecture, in this process."""
    sys.path.insert(0, str(zoo_path))
    import torch
    import zoo

    from mhc_compile import MHCConfig, NoResidualError

    from .perturbed import compare

    _complete(zoo)
    torch.set_num_threads(1)
    (fusion, recompute), manifold, n_streams, readout = CHOICES[zlib.crc32(name.encode()) % len(CHOICES)]
    options = {"n_streams": n_streams, "manifold": manifold, "readout": readout}
    record: dict[str, object] = {"name": name, "options": f"{fusion} {recompute} {manifold} {n_streams} {readout}"}
    config = MHCConfig(min_sites=1, **options)
    for double in (True, False):
        torch._dynamo.reset()
        try:
            *_, model, inputs, _ = zoo.build(name)
        except Exception as error:
            return {**record, "verdict": f"not built: {type(error).__name__}: {str(error)[:200]}"}
        _without_dropout(model, training="_gc" in name)
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        try:
            report, found = compare(
                model,
                kwargs=inputs,
                config=config,
                options={"fusion": fusion, "recompute": recompute},
                double=double,
                wide=double,
                floor=1e-5 if double else 1e-3,
            )
        except NoResidualError:
            return {**record, "verdict": "no sites"}
        except Exception as error:
            record["verdict"] = f"{type(error).__name__}: {str(error)[:500]}"
            continue
        ((out, gradient, where),) = found
        good = out <= OUT and gradient <= GRADIENT
        widths = sorted({site.width for site in report.sites})
        record |= {"sites": len(report.sites), "widths": widths, "double": double}
        record |= {"out": out, "gradient": gradient, "where": where}
        record["verdict"] = "ok" if good else f"outputs differ by {out:.1e}, gradients by {gradient:.1e} at {where}"
        break
    return record


def _complete(zoo: Any) -> None:
    """Add to a zoo's table what it leaves out: an architecture whose class transformers lists under another name first.

    Which name comes first changes from version to version of transformers.
    """
    from transformers.models.auto import modeling_auto

    listed = {name for name, *_ in zoo.table()}
    for family, mapping in zoo.FAMILY_MAPS:
        for kind, named in getattr(modeling_auto, mapping).items():
            if f"{family}/{kind}" not in listed:
                zoo.table().append((f"{family}/{kind}", family, kind, named if isinstance(named, str) else named[0]))


def _without_dropout(model: object, training: bool) -> None:
    """Switch dropout off; gradient checkpointing acts in training mode only."""
    model.train(training)
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or (key == "p" and "Drop" in type(module).__name__)):
                setattr(module, key, 0.0)


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in ("torch", "transformers")}


def main() -> int:
    """Run the children, print the differences, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, required=True, help="folder with zoo.py and expected.json")
    parser.add_argument("--only", default=".", help="regular expression over names")
    parser.add_argument("--every", type=int, default=1, help="take every k-th architecture")
    parser.add_argument("--start", type=int, default=0, help="leave out the first so many of these")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=400, help="seconds for one architecture")
    parser.add_argument("--json", type=Path, help="write the records here; tests.compatibility makes a page of them")
    parser.add_argument("--resume", action="store_true", help="leave out what the file of records has")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing further after so many")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run_one(arguments.zoo, arguments.one)))
        return 0
    known = sorted(json.loads((arguments.zoo / "expected.json").read_text()))
    names = [name for name in known if re.search(arguments.only, name)][arguments.start :: arguments.every]
    kept = _kept(arguments.json)
    if arguments.resume:
        names = [name for name in names if name not in kept]
    ends = time.time() + 60 * arguments.minutes

    def child(name: str) -> dict[str, object] | None:
        if time.time() > ends:
            return None
        command = [sys.executable, "-m", "tests.zoo_oracle", "--zoo", str(arguments.zoo)]
        command += ["--one", name]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        started = time.time()
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit, env=environment)
            record = json.loads(done.stdout.splitlines()[-1])
        except subprocess.TimeoutExpired:
            record = {"name": name, "verdict": "too slow"}
        except (IndexError, ValueError):
            record = {"name": name, "verdict": f"died: {done.stderr[-400:]}"}
        record |= {"seconds": round(time.time() - started, 1), "date": time.strftime("%Y-%m-%d")}
        print(json.dumps(record), flush=True)
        return record

    records = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for record in pool.map(child, names):
            if record is None:
                continue
            records.append(record)
            kept[record["name"]] = record
            if arguments.json:
                content = {"versions": _versions(), "records": [kept[name] for name in sorted(kept)]}
                arguments.json.write_text(json.dumps(content, indent=1) + "\n")
    verdicts = collections.Counter("ok" if record["verdict"] == "ok" else "other" for record in records)
    for record in records:
        if record["verdict"] not in ("ok", "no sites"):
            print(f"{record['name']}: {record['verdict']}")
    print(f"{verdicts['ok']} of {len(records)} equal the oracle; {len(names) - len(records)} not begun")
    return int(any(record["verdict"] not in ("ok", "no sites") for record in records))


def _kept(path: Path | None) -> dict[str, dict[str, object]]:
    """Return the records that a file holds, by name.

    Raises:
        SystemExit: they were made with other versions: one page cannot say both.
    """
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text())
    if content["versions"] != _versions():
        sys.exit(f"{path} was made with {content['versions']}, here is {_versions()}: choose another file.")
    return {record["name"]: record for record in content["records"]}


if __name__ == "__main__":
    sys.exit(main())
