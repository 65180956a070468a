"""The house rules that no linter knows."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OUTSIDE = sorted((ROOT / "mhc_compile").rglob("*.py"))

# Attributes of torch.fx.Node by which a graph is read.
_NODE_ATTRIBUTES = {"all_input_nodes", "users", "meta"}


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_passes_read_nodes(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.fx")
        for alias in node.names
    }
    read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & {
        "all_input_nodes",
        "users",
        "meta",
    }
    walks = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "nodes" and isinstance(node.value, ast.Attribute)
    ]
    # A plan keeps the node of a chain's head for the rewrite, and never looks at it.
    kept = {"Node"} if path.name == "sites.py" else set()
    assert not imported & ({"Node", "Interpreter"} - kept), "reads nodes: a pass should"
    assert not read, f"reads {sorted(read)} of nodes: a pass should"
    assert not walks, f"walks over nodes at lines {walks}: a pass should"


def test_at_most_sixteen_flat_files():
    assert len(list((ROOT / "mhc_compile").glob("*.py"))) <= 16
