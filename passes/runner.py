"""Runs passes by name: times them, shows what they did, and leaves out those that are switched off."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch._logging import trace_structured
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

T = TypeVar("T")


@dataclass
class PassRunner:
    """Runs the passes over one captured graph.

    Each graph is left as an artifact of torch's structured trace (`TORCH_TRACE`, shown by `tlparse`), and shown by the
    logger at level DEBUG.

    Attributes:
        function: the frame's function, for what is shown.
        logger: of the `TORCH_LOGS` artifact.
        disabled: names of rewrites to leave out.
        seconds: how long each pass took, by its name, in the order in which they ran.
    """

    function: str
    logger: logging.Logger
    disabled: Iterable[str] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def includes(self, name: str) -> bool:
        """Return whether a pass is to run, and show it if it is switched off."""
        if name in self.disabled:
            self.logger.debug("%s of %s: switched off", name, self.function)
        return name not in self.disabled

    def read(self, name: str, step: Callable[..., T], *args: Any) -> T:
        """Run a pass that returns data, and return it."""
        start = time.perf_counter()
        result = step(*args)
        self.seconds[name] = time.perf_counter() - start
        self.logger.debug("%s of %s: %.1f ms", name, self.function, 1e3 * self.seconds[name])
        return result

    def rewrite(self, name: str, step: Callable[..., GraphModule], graph: GraphModule, *args: Any) -> GraphModule:
        """Run a pass that returns a graph, and return that; or the graph as it is, if the pass is switched off."""
        if not self.includes(name):
            return graph
        start = time.perf_counter()
        # Operations on distributed example values with symbolic sizes ask whether they are being traced.
        with _fake_mode(graph):
            result = step(graph, *args)
        self.seconds[name] = time.perf_counter() - start
        self.logger.debug(
            "%s of %s: %.1f ms, %s", name, self.function, 1e3 * self.seconds[name], _change(graph, result)
        )
        if result is not graph:
            self.show(f"after {name}", result)
        return result

    def show(self, title: str, graph: GraphModule) -> None:
        """Show a graph, and leave it in the structured trace."""
        self.logger.debug("%s:\n%s", title, graph.graph)
        leave_artifact(f"mhc {title}", lambda: graph.print_readable(print_output=False))


def leave_artifact(name: str, text: Callable[[], str]) -> None:
    """Leave a text in torch's structured trace; it is made only where someone records the trace."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name.replace(" ", "_"), "encoding": "string"},
        payload_fn=text,
    )


def _fake_mode(graph: GraphModule) -> contextlib.AbstractContextManager[Any]:
    """Return the mode in which a graph's example values were made."""
    examples = (node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder")
    mode = next((example.fake_mode for example in examples if isinstance(example, FakeTensor)), None)
    return mode or contextlib.nullcontext()


def _change(before: GraphModule, after: GraphModule) -> str:
    if after is before:
        return "nothing to do"
    return f"{len(before.graph.nodes)} nodes became {len(after.graph.nodes)}"
