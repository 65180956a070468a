"""Break one line of passes/ or kernels/ at a time and see whether a test notices: `python -m tests.mutation`.

Fifty mutations are drawn by `--seed` from all that `mutations` finds: another comparison, arithmetic or boolean
operator, another number, a negated condition, a returned None, a deleted statement. Lines that only annotate, document
or raise are left alone. A draw hangs on the text of the lines alone: what is edited elsewhere does not change it.

Each mutant gets its own copy of the tree, and compiler caches of its own, and runs the tests piece by piece: those that
lie nearest to its file first, then, unless `--nearest-only`, all others. It is caught by the first test that fails, if
that test passes on a copy without the mutation. GPU kernels (`kernels/gpu`) run in Triton's interpreter. Survivors are
printed with their line; exit status 1 if there are more than `--allowed`.

The whole takes many hours. With `--json` every piece is written down as soon as it has run, `--resume` goes on where
the file ends, and `--minutes` begins no further piece after so many.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .matrix import ROOT, copy_tree

ROOMS = ("passes", "kernels")
# Tests nearest to a file first: by the beginning of its path, the first that fits.
NEAREST = {
    "passes/finding": ["tests/passes/finding", "tests/passes/test_find_residuals.py", "tests/test_kinds_of_models.py"],
    "passes/fx": ["tests/passes", "tests/test_kinds_of_models.py"],
    "passes/annotate_recompute": ["tests/passes", "tests/test_checkpointing.py"],
    "passes/describe_memory": ["tests/passes/test_describe_memory.py"],
    "passes/count_branch_work": ["tests/test_explain_prediction.py"],
    "passes": ["tests/passes", "tests/test_oracle.py", "tests/test_kinds_of_models.py", "tests/fuzz"],
    "kernels/costs": ["tests/kernels/costs", "tests/test_explain_prediction.py"],
    "kernels/cpu": ["tests/kernels/cpu"],
    "kernels/gpu": ["tests/kernels/gpu"],
    "kernels": ["tests/kernels", "tests/test_oracle.py"],
}
# So many files of tests at the top are one piece.
TOGETHER = 8
_OK, _NO_TESTS, _MISUSED = 0, 5, 4
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One changed line: `before` and `after` are the source of the part that changes, `key` is its name in a draw."""

    file: str
    line: int
    column: int
    end: int
    before: str
    after: str
    key: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.before}  ->  {self.after}"


def mutations(file: Path) -> Iterator[Mutation]:
    """Yield every one-line mutation of a file."""
    source = file.read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    skipped = {id(inner) for node in ast.walk(tree) if _says_nothing(node) for inner in ast.walk(node)}
    name = str(file.relative_to(ROOT))
    alike: Counter[str] = Counter()
    for node in ast.walk(tree):
        if id(node) in skipped or getattr(node, "lineno", None) != getattr(node, "end_lineno", 0):
            continue
        changed = _changed(node)
        if changed is None:
            continue
        # Columns of the syntax tree count bytes.
        line = lines[node.lineno - 1].encode()
        before = line[node.col_offset : node.end_col_offset].decode()
        if before != changed:
            text = f"{name} {line.decode().strip()} {before} {changed}"
            alike[text] += 1
            key = f"{text} {alike[text]}"
            yield Mutation(name, node.lineno, node.col_offset, node.end_col_offset, before, changed, key)


def _says_nothing(node: ast.AST) -> bool:
    """Return whether a node is an annotation, an import or what an error says."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.ImportFrom | ast.Import):
        return True
    return isinstance(node, ast.AnnAssign) and node.value is None


def _changed(node: ast.AST) -> str | None:
    """Return other source for a node, None if there is none."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        return ast.unparse(ast.Compare(node.left, [SWAPS[type(node.ops[0])](), *node.ops[1:]], node.comparators))
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS and not _is_annotation(node):
        return f"({ast.unparse(ast.BinOp(node.left, SWAPS[type(node.op)](), node.right))})"
    if isinstance(node, ast.BoolOp):
        return f"({ast.unparse(ast.BoolOp(SWAPS[type(node.op)](), node.values))})"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return f"bool({ast.unparse(node.operand)})"
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return str(not node.value)
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return repr(node.value + 1)
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        return "return None"
    if isinstance(node, ast.Continue | ast.Break) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return "pass"
    return None


def _is_annotation(node: ast.BinOp) -> bool:
    """Return whether `a | b` is a union of types."""
    names = [side.id for side in (node.left, node.right) if isinstance(side, ast.Name)]
    nothing = isinstance(node.right, ast.Constant) and node.right.value is None
    return isinstance(node.op, ast.BitOr) and (nothing or any(name[:1].isupper() or name in _TYPES for name in names))


_TYPES = {"int", "float", "str", "bool", "tuple", "list", "dict", "set"}


def drawn(seed: int, count: int, rooms: tuple[str, ...] = ROOMS) -> list[Mutation]:
    """Draw mutations, all alike likely, in the order of a hash of their text."""
    files = (file for room in rooms for file in sorted((ROOT / room).rglob("*.py")))
    all_of_them = (mutation for file in files for mutation in mutations(file))
    return sorted(all_of_them, key=lambda mutation: hashlib.sha256(f"{seed} {mutation.key}".encode()).digest())[:count]


def pieces_for(file: str, nearest_only: bool) -> list[list[str]]:
    """Return what pytest is given, call by call: the test that bears a file's name, those nearest, all others."""
    nearest = next(tests for beginning, tests in NEAREST.items() if file.startswith(beginning))
    own = f"tests/{Path(file).parent}/test_{Path(file).name}"
    pieces = [[piece] for piece in ([own] if (ROOT / own).exists() else []) + nearest]
    if nearest_only:
        return pieces
    tests = ROOT / "tests"
    folders = sorted({path.relative_to(ROOT).parts[1] for path in tests.glob("*/**/test_*.py")})
    pieces += [[f"tests/{folder}"] for folder in folders]
    top = sorted(str(path.relative_to(ROOT)) for path in tests.glob("test_*.py"))
    return pieces + [top[start : start + TOGETHER] for start in range(0, len(top), TOGETHER)]


class Tree:
    """A copy of the working tree with at most one line changed, and compiler caches of its own.

    AOTAutograd's cache knows an operator by its name: it would hand a mutant what the unmutated one has compiled.
    """

    def __init__(self, folder: Path, mutation: Mutation | None, limit: int) -> None:
        self.folder, self.mutation, self.limit = folder, mutation, limit
        copy_tree(folder / "tree")
        if mutation is not None:
            path = folder / "tree" / mutation.file
            lines = path.read_text().splitlines(keepends=True)
            line = lines[mutation.line - 1].encode()
            changed = line[: mutation.column] + mutation.after.encode() + line[mutation.end :]
            lines[mutation.line - 1] = changed.decode()
            path.write_text("".join(lines))

    def failing(self, tests: list[str], skipped: list[str]) -> tuple[list[str], str] | None:
        """Run tests; return the first that fails, or all of them if the run itself fails, and how. None if none does.

        Raises:
            RuntimeError: pytest could not run them at all.
        """
        own = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        if self.mutation is not None and self.mutation.file == "kernels/cpu/build.py":
            own["TORCH_EXTENSIONS_DIR"] = str(self.folder / "extensions")
        command = [sys.executable, "-m", "pytest", "-x", "-rfE", "-n", "0", "-p", "no:cacheprovider", *tests]
        command += [f"--deselect={test}" for test in skipped]
        try:
            done = subprocess.run(
                command, cwd=self.folder / "tree", capture_output=True, text=True, env={**os.environ, **own},
                timeout=self.limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return tests, f"no end within {self.limit} s"
        if done.returncode in (_OK, _NO_TESTS):
            return None
        if done.returncode == _MISUSED:
            raise RuntimeError(f"pytest does not run {' '.join(tests)}: {done.stdout[-500:]} {done.stderr[-500:]}")
        found = re.search(r"^(?:FAILED|ERROR) (tests/.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
        return ([found[1]], found[0][:200]) if found else (tests, f"exit status {done.returncode}")


class Trial:
    """What is known of one mutant: `record` goes to the file."""

    def __init__(self, mutation: Mutation, record: dict[str, Any] | None) -> None:
        self.mutation = mutation
        fresh = {"key": mutation.key, "passed": [], "says_nothing": [], "caught": None, "by": "", "seconds": 0.0}
        self.record: dict[str, Any] = {**fresh, **(record or {}), "mutation": str(mutation)}

    def run(self, plain: Tree, nearest_only: bool) -> Iterator[None]:
        """Run one piece after another until one catches the mutant or none is left; yield after each."""
        with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
            tree = Tree(Path(folder), self.mutation, plain.limit)
            pieces = pieces_for(self.mutation.file, nearest_only)
            for piece in pieces:
                if " ".join(piece) in self.record["passed"]:
                    continue
                started = time.time()
                self._try(tree, piece, plain)
                self.record["seconds"] = round(self.record["seconds"] + time.time() - started, 1)
                yield
                if self.record["caught"]:
                    return
        if not nearest_only:
            self.record["caught"] = False
        yield

    def _try(self, tree: Tree, piece: list[str], plain: Tree) -> None:
        while (failed := tree.failing(piece, self.record["says_nothing"])) is not None:
            tests, how = failed
            if plain.failing(tests, []) is None:
                self.record |= {"caught": True, "by": how}
                return
            # It fails without the mutation as well.
            self.record["says_nothing"] += tests
            if tests == piece:
                break
        self.record["passed"].append(" ".join(piece))


def main() -> int:
    """Draw, run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--start", type=int, default=0, help="leave out the first so many of the drawn ones")
    parser.add_argument("--stop", type=int, help="end before this one")
    parser.add_argument("--allowed", type=int, default=3, help="survivors")
    parser.add_argument("--nearest-only", action="store_true", help="leave what passes the nearest tests open")
    parser.add_argument("--limit", type=int, default=1800, help="seconds for one piece of the tests")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further piece after so many")
    parser.add_argument("--list", action="store_true", help="show what would be run")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--resume", action="store_true", help="go on where the file of results ends")
    arguments = parser.parse_args()
    chosen = drawn(arguments.seed, arguments.count)[arguments.start : arguments.stop]
    if arguments.list:
        for number, mutation in enumerate(chosen, arguments.start):
            print(number, mutation)
        return 0
    known = {}
    if arguments.resume and arguments.json and arguments.json.exists():
        known = {record["key"]: record for record in json.loads(arguments.json.read_text())}
    trials = [Trial(mutation, known.get(mutation.key)) for mutation in chosen]
    # What other slices of the same draw have found stays in the file.
    others = [record for key, record in known.items() if key not in {mutation.key for mutation in chosen}]
    ends = time.time() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="unmutated_") as folder:
        plain = Tree(Path(folder), None, arguments.limit)
        for number, trial in enumerate(trials, arguments.start):
            if trial.record["caught"] is not None:
                continue
            for _ in trial.run(plain, arguments.nearest_only):
                if arguments.json:
                    ran = [each.record for each in trials if each.record["passed"] or each.record["caught"] is not None]
                    arguments.json.write_text(json.dumps(ran + others, indent=1) + "\n")
                if time.time() > ends:
                    break
            print(number, _said(trial.record), flush=True)
            if time.time() > ends:
                break
    survivors = [trial.record for trial in trials if trial.record["caught"] is False]
    open_ones = sum(trial.record["caught"] is None for trial in trials)
    for record in survivors:
        print("survived:", record["mutation"])
    print(f"{len(trials) - len(survivors) - open_ones} caught, {len(survivors)} survived, {open_ones} not finished")
    return int(len(survivors) > arguments.allowed)


def _said(record: dict[str, Any]) -> str:
    verdict = {True: "caught", False: "SURVIVED", None: f"passed {len(record['passed'])} pieces so far"}
    return f"{verdict[record['caught']]} {record['mutation']}  {record['by']}  {record['seconds']:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
