"""Break one line of passes/ or kernels/ at a time and see whether a test notices: `python -m tests.mutation`.

Fifty mutations are drawn by `--seed` from all that `mutations` finds: another comparison, arithmetic or boolean
operator, another number, a negated condition, a returned None, a deleted statement. Lines that only annotate, document
or raise are left alone. Each mutant gets its own copy of the tree and runs the tests that lie nearest to its file
first, then, unless `--nearest-only`, the whole suite; it is caught as soon as one fails. GPU kernels (`kernels/gpu`)
run in Triton's interpreter. Survivors are printed with their line; exit status 1 if there are more than `--allowed`.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One changed line: `before` and `after` are the source of the part that changes."""

    file: str
    line: int
    column: int
    end: int
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}  {self.before}  ->  {self.after}"


def mutations(file: Path) -> Iterator[Mutation]:
    """Yield every one-line mutation of a file."""
    source = file.read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    skipped = {id(inner) for node in ast.walk(tree) if _says_nothing(node) for inner in ast.walk(node)}
    name = str(file.relative_to(ROOT))
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
            yield Mutation(name, node.lineno, node.col_offset, node.end_col_offset, before, changed)


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


def drawn(seed: int, count: int, every_room: tuple[str, ...] = ROOMS) -> list[Mutation]:
    """Draw mutations: a file by its number of mutations, then a line."""
    files = sorted(file for room in every_room for file in (ROOT / room).rglob("*.py"))
    all_of_them = [mutation for file in files for mutation in mutations(file)]
    return random.Random(seed).sample(all_of_them, count)


def tests_for(file: str) -> list[str]:
    """Return the tests that lie nearest to a file, the one that bears its name first."""
    nearest = next(tests for beginning, tests in NEAREST.items() if file.startswith(beginning))
    own = ROOT / "tests" / Path(file).parent / f"test_{Path(file).name}"
    return ([str(own.relative_to(ROOT))] if own.exists() else []) + nearest


def is_caught(mutation: Mutation, nearest_only: bool, limit: int) -> tuple[bool, str]:
    """Run the tests on a mutant; return whether one failed, and which."""
    with tempfile.TemporaryDirectory(prefix="mutant_") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        path = tree / mutation.file
        lines = path.read_text().splitlines(keepends=True)
        line = lines[mutation.line - 1].encode()
        lines[mutation.line - 1] = (line[: mutation.column] + mutation.after.encode() + line[mutation.end :]).decode()
        path.write_text("".join(lines))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"TORCH_EXTENSIONS_DIR": str(Path(folder) / "extensions")} if "cpu" in mutation.file else {}
        for tests in (tests_for(mutation.file), *([] if nearest_only else [["tests"]])):
            command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
            try:
                done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment, timeout=limit)
            except subprocess.TimeoutExpired:
                return True, f"no end within {limit} s"
            if done.returncode:
                words = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return True, (words or [f"exit status {done.returncode}"])[0][:160]
    return False, ""


def main() -> int:
    """Draw, run and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--start", type=int, default=0, help="leave out the first so many of the drawn ones")
    parser.add_argument("--stop", type=int, help="end before this one")
    parser.add_argument("--allowed", type=int, default=3, help="survivors")
    parser.add_argument("--nearest-only", action="store_true")
    parser.add_argument("--limit", type=int, default=3600, help="seconds for one run of tests")
    parser.add_argument("--list", action="store_true", help="show what would be run")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    chosen = drawn(arguments.seed, arguments.count)[arguments.start : arguments.stop]
    survivors, results = [], []
    for number, mutation in enumerate(chosen, arguments.start):
        if arguments.list:
            print(number, mutation)
            continue
        started = time.time()
        caught, how = is_caught(mutation, arguments.nearest_only, arguments.limit)
        survivors += [] if caught else [mutation]
        results.append({"mutation": str(mutation), "caught": caught, "by": how})
        print(
            f"{number} {'caught' if caught else 'SURVIVED'} {mutation}  {how}  {time.time() - started:.0f} s",
            flush=True,
        )
    for mutation in survivors:
        print("survived:", mutation)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(len(survivors) > arguments.allowed)


if __name__ == "__main__":
    sys.exit(main())
