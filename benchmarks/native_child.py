"""Compile one model that carries streams and print what it took as JSON; `benchmarks.native` starts it."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from mhc_compile.passes.analyze import analyze
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from mhc_compile import backend

from .hand_written import DeepSeekV4

WIDTH, TOKENS = 64, 64
# What the loss is multiplied by to see whether gradients stay finite.
_GRADIENT_SIZES = (1.0, 1e8, 1e16)
# What launches nothing: views, and what only makes memory.
_FREE = {
    "view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "expand", "split", "split_with_sizes", "unbind",
    "transpose", "permute", "t", "slice", "select", "detach", "alias", "as_strided", "empty", "empty_like",
    "new_empty", "getitem", "placeholder", "output",
}  # fmt: skip


def streams(layers: int) -> DeepSeekV4:
    """Build DeepSeek-V4's mixers around feed-forward branches, two a layer, and its head, with random weights."""
    branches = nn.ModuleList(
        nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        for _ in range(2 * layers)
    )
    model = DeepSeekV4(WIDTH, branches)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


class _Launches(TorchDispatchMode):
    """Counts the operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += _launches(func)
        return func(*args, **(kwargs or {}))


def _launches(target: Any) -> bool:
    name = target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else ""
    return bool(name) and name not in _FREE


class Seen:
    """What the inner compiler was given, and what AOTAutograd made of it."""

    def __init__(self, inner: str) -> None:
        """Wrap a backend."""
        self.inner, self.graph_nodes, self.aten_nodes, self.operators = inner, 0, 0, 0

    def compile(self, graph_module: Any, inputs: Any, *_: Any) -> Callable[..., Any]:
        """Compile as the inner backend does."""
        self.graph_nodes += len(graph_module.graph.nodes)
        return lookup_backend(self.inner)(graph_module, inputs)

    def count(self, graph: Any) -> None:
        """Count the nodes of a graph that Inductor is given."""
        self.aten_nodes += len(graph.nodes)
        calls = [node.target for node in graph.nodes if node.op == "call_function"]
        self.operators += sum(
            isinstance(target, torch._ops.OpOverload) and target.namespace == "mhc" for target in calls
        )


def measure(compiler: str, layers: int, inner: str, device: str) -> dict[str, Any]:
    """Compile and run a few training steps; return seconds and counts."""
    torch.manual_seed(0)
    model = streams(layers).to(device)
    x = torch.randn(1, TOKENS, WIDTH, device=device)
    with _Launches() as eager, torch.no_grad():
        model(x)
    with _Launches() as branches, torch.no_grad():
        for branch in model.branches:
            branch(x)
    seen, analysis = Seen(inner), [0.0]

    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        result = analyze(*arguments)
        analysis[0] += time.perf_counter() - begin
        return result

    def whole(graph_module: Any, inputs: Any) -> Any:
        if compiler == "inductor":
            return seen.compile(graph_module, inputs)
        compile_inner = mock.patch.object(backend, "compile_inner", seen.compile)
        with compile_inner, mock.patch.object(backend, "analyze", timed):
            return backend.mhc(graph_module, inputs, options={"fusion": compiler})

    whole.compiler_name = "mhc"  # type: ignore[attr-defined]
    metrics.reset()
    compiled = torch.compile(model, backend=whole, dynamic=False)
    steps = []
    with torch._inductor.config.patch(post_grad_custom_post_pass=_Counted(seen)):
        for _ in range(6):
            begin = time.perf_counter()
            compiled(x).square().sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            steps.append(time.perf_counter() - begin)
    infinite = 0
    for size in _GRADIENT_SIZES:
        model.zero_grad()
        (size * compiled(x).square().sum()).backward()
        infinite += sum(int((~p.grad.isfinite()).sum()) for p in model.parameters() if p.grad is not None)
    sites = 2 * layers
    step = statistics.median(steps[1:])
    launched = metrics.generated_kernel_count + seen.operators if inner == "inductor" else None
    return {
        "compile_seconds": steps[0] - step,
        "analyze_seconds": None if compiler == "inductor" else analysis[0],
        "graph_nodes": seen.graph_nodes,
        "aten_nodes": seen.aten_nodes,
        "launches_per_site": None if launched is None else launched / sites,
        "eager_launches_per_site": (eager.count - branches.count) / sites,
        "step_seconds": step,
        "infinite_gradients": infinite,
    }


class _Counted:
    """A pass that counts and changes nothing; Inductor asks it for a key for its cache."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    def __call__(self, graph: Any) -> None:
        self.seen.count(graph)

    def uuid(self) -> None:
        """Return none: what was compiled here is not kept."""
        return


def main() -> None:
    """Read the case, measure it, print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--compiler", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--inner", required=True)
    parser.add_argument("--device", required=True)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    print(json.dumps(measure(given.compiler, given.layers, given.inner, given.device)))


if __name__ == "__main__":
    main()
