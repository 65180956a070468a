"""Split a graph into DDP's buckets behind the rewrite, not before it.

Under DistributedDataParallel, Dynamo's DDPOptimizer cuts the graph where a bucket of gradients is full, and gives the
backend one piece after the other: the gradients of a bucket can then be reduced while the backward of the one before
runs. A cut may lie anywhere in a residual block, where no piece shows the block. So for this backend the cutting is put
off: the backend gets the whole graph, rewrites it, and has DDPOptimizer cut the result for the inner compiler. What
crosses a cut then are streams, coefficients and branches, tensors like any others.

Dynamo has no option for this (torch 2.11 to 2.15): `DDPOptimizer.compile_fn` is wrapped, and does as ever for all other
backends.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

from torch.fx import GraphModule

from ..attachment.entrances import BACKEND_NAME
from ..passes.fx.cache_key import copy_cache_key
from ..passes.gather_items import gather_items
from ..passes.localize_sizes import localize_sizes

Compile = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]

# The DDPOptimizer whose cutting has been put off while the backend is at work.
_PUT_OFF: ContextVar[Any] = ContextVar("mhc_ddp_optimizer", default=None)


def put_off_ddp_buckets() -> None:
    """Have DDPOptimizer give this backend whole graphs; doing so again changes nothing."""
    try:
        from torch._dynamo.backends.distributed import DDPOptimizer
    except ImportError:
        return
    plain = DDPOptimizer.compile_fn
    if hasattr(plain, "puts_off"):
        return

    @functools.wraps(plain)
    def compile_fn(self: Any, graph_module: GraphModule, example_inputs: list[Any], **more: Any) -> Any:
        if getattr(self.backend_compile_fn, "compiler_name", None) != BACKEND_NAME:
            return plain(self, graph_module, example_inputs, **more)
        token = _PUT_OFF.set(self)
        try:
            return self.backend_compile_fn(graph_module, example_inputs, **more)
        finally:
            _PUT_OFF.reset(token)

    compile_fn.puts_off = True  # type: ignore[attr-defined]
    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign,assignment]


def compile_in_buckets(graph_module: GraphModule, example_inputs: Sequence[Any], compile_one: Compile) -> Any:
    """Compile a rewritten graph, bucket by bucket where DDPOptimizer would have cut the graph that it came from.

    Args:
        graph_module: torch IR; its placeholders line up with `example_inputs`.
        example_inputs: fake or real.
        compile_one: the inner compiler.
    """
    optimizer = _PUT_OFF.get()
    if optimizer is None:
        return compile_one(graph_module, example_inputs)

    def compile_piece(piece: GraphModule, inputs: Sequence[Any], **more: Any) -> Any:
        copy_cache_key(graph_module, piece)
        return compile_one(piece, inputs)

    behind = type(optimizer)(optimizer.bucket_bytes_cap, compile_piece, optimizer.first_bucket_cap)
    return behind.compile_fn(gather_items(localize_sizes(graph_module)), list(example_inputs))
