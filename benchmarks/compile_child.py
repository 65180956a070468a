"""Compile one model in this process and print what it took as JSON; `benchmarks.compile_time` starts it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch

import mhc_compile
from mhc_compile import backend

from .llama import PLAIN, Setting, build, tokens_of

STEP = "step"
BY_BLOCK = "step by block"
GENERATION = "generation"
WORKS = (STEP, BY_BLOCK, GENERATION)


class Clock:
    """Seconds within the backend, and within the inner compiler that it calls."""

    def __init__(self) -> None:
        """Start at zero."""
        self.backend = 0.0
        self.inner = 0.0

    def timed(self, options: dict[str, Any]) -> Callable[..., Any]:
        """Return the backend "mhc" with these options, timed."""
        compile_inner = backend.compile_inner

        def inner(*arguments: Any) -> Any:
            begin = time.perf_counter()
            try:
                return compile_inner(*arguments)
            finally:
                self.inner += time.perf_counter() - begin

        def whole(graph_module: Any, example_inputs: Any) -> Any:
            begin = time.perf_counter()
            try:
                with mock.patch.object(backend, "compile_inner", inner):
                    return backend.mhc(graph_module, example_inputs, options=options)
            finally:
                self.backend += time.perf_counter() - begin

        # Dynamo and the checks of fallen-back frames know a backend by this name.
        whole.compiler_name = "mhc"  # type: ignore[attr-defined]
        return whole


def measure(setting: Setting, fusion: str, inner: str, device: str, work: str) -> dict[str, Any]:
    """Attach, compile and run what `work` says, until nothing is compiled any more; return seconds.

    `compile` is what the first runs took less as many of the last; `passes` is what the backend takes beside the inner
    compiler.
    """
    model = build(setting, device)
    batch = tokens_of(setting, device)
    clock = Clock()
    attach = 0.0
    backend_of_case: Any = inner
    if fusion != PLAIN:
        begin = time.perf_counter()
        mhc_compile.attach(model, input_ids=batch, labels=batch)
        attach = time.perf_counter() - begin
        backend_of_case = clock.timed({"fusion": fusion, "inner": inner})
    seconds = []
    for run in runs(model, batch, backend_of_case, work):
        begin = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    *first, last = seconds
    return {
        "compile_seconds": sum(first) - len(first) * last,
        "attach_seconds": attach,
        "passes_seconds": clock.backend - clock.inner,
    }


def runs(model: Any, batch: torch.Tensor, backend_of_case: Any, work: str) -> list[Callable[[], Any]]:
    """Compile the model for this work; return the runs of which the last compiles nothing."""
    if work == GENERATION:
        model.eval()
        model.compile(backend=backend_of_case)
        # The second length is the one that makes sizes symbols.
        prompts = [batch[:1, :length] for length in (5, 9, 7)]
        return [partial(model.generate, prompt, max_new_tokens=3, do_sample=False) for prompt in prompts]
    if work == BY_BLOCK:
        for block in model.model.layers:
            block.compile(backend=backend_of_case, dynamic=False)
    compiled = model if work == BY_BLOCK else torch.compile(model, backend=backend_of_case, dynamic=False)
    return [lambda: compiled(input_ids=batch, labels=batch).loss.backward()] * 2


def main() -> None:
    """Read the case, measure it, print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--setting", type=json.loads, required=True)
    parser.add_argument("--fusion", required=True)
    parser.add_argument("--inner", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--work", required=True, choices=WORKS)
    given = parser.parse_args()
    if given.device == "cpu":
        torch.set_num_threads(1)
    print(json.dumps(measure(Setting(**given.setting), given.fusion, given.inner, given.device, given.work)))


if __name__ == "__main__":
    main()
