"""How long the search for residual adds takes, and how it grows with depth: tiny Llamas of 8, 32 and 128 layers.

    python -m benchmarks.finder_time [--layers 8 32 128] [--repeats 5] [--out FILE]

Prints normalising and searching apart, microseconds a node (flat where the search is linear) and the share of the
time that Dynamo took to capture the same graph.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from mhc_compile.passes.find_residuals import find_residuals
from mhc_compile.passes.normalize import normalize
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule


@dataclass(frozen=True)
class Row:
    """One depth: sizes, what was found, and seconds, the least of the repeats."""

    layers: int
    nodes: int
    sites: int
    capture_seconds: float
    normalize_seconds: float
    find_seconds: float

    @property
    def microseconds_per_node(self) -> float:
        """Time of the search by the size of the graph."""
        return self.find_seconds / self.nodes * 1e6


def capture(layers: int) -> tuple[GraphModule, float]:
    """Return the graph that Dynamo captures of a Llama of this depth, and the seconds it took."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=99,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    graphs: list[GraphModule] = []

    def collect(graph_module: GraphModule, _: list[Any]) -> Callable[..., Any]:
        graphs.append(graph_module)
        return graph_module.forward

    torch._dynamo.reset()
    start = time.perf_counter()
    torch.compile(model, backend=collect)(torch.arange(8)[None], use_cache=False)
    seconds = time.perf_counter() - start
    if len(graphs) != 1:
        raise RuntimeError(f"Dynamo captured {len(graphs)} graphs instead of one: TORCH_LOGS=graph_breaks shows why")
    return graphs[0], seconds


def measure(layers: int, repeats: int) -> Row:
    """Capture one depth and time both passes over its graph."""
    graph_module, captured = capture(layers)
    normalized, normalizing = _least(lambda: normalize(graph_module), repeats)
    findings, finding = _least(lambda: find_residuals(normalized), repeats)
    return Row(
        layers=layers,
        nodes=len(normalized.graph.nodes),
        sites=sum(len(chain.adds) for chain in findings.chains),
        capture_seconds=captured,
        normalize_seconds=normalizing,
        find_seconds=finding,
    )


def _least(call: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def _print(rows: list[Row]) -> None:
    table = Table(title="searching for residual adds", title_justify="left")
    for heading in ("layers", "nodes", "sites", "normalize", "find", "find, a node", "of capture"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.layers),
            f"{row.nodes:,}",
            str(row.sites),
            f"{row.normalize_seconds * 1e3:.0f} ms",
            f"{row.find_seconds * 1e3:.0f} ms",
            f"{row.microseconds_per_node:.0f} µs",
            f"{(row.normalize_seconds + row.find_seconds) / row.capture_seconds:.1%}",
        )
    Console(width=120).print(table)


def main() -> int:
    """Measure every depth, print a table, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    if min(*arguments.layers, arguments.repeats) < 1:
        parser.error("--layers and --repeats must be at least 1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    rows = [measure(layers, arguments.repeats) for layers in arguments.layers]
    _print(rows)
    result = {
        "processor": platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [{**asdict(row), "microseconds_per_node": row.microseconds_per_node} for row in rows],
    }
    text = json.dumps(result, indent=1)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
