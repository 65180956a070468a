"""Hand the rewritten graph to the inner compiler."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from torch.fx import GraphModule

from .. import logs
from ..config import MHCConfig
from ..errors import MHCOptionError
from ..passes.describe_memory import describe_memory
from .ddp_buckets import compile_in_buckets


def compile_inner(
    graph_module: GraphModule, example_inputs: Sequence[Any], config: MHCConfig, mode: str | None
) -> Callable[..., Any]:
    """Compile a graph with the backend that the option `inner` names.

    Args:
        graph_module: torch IR; its placeholders line up with `example_inputs`.
        example_inputs: tensors (real or fake) and sizes.
        config: names the inner backend.
        mode: a mode of `torch.compile`; only Inductor has modes.

    Raises:
        MHCOptionError: the backend does not exist, or a mode was given for one without modes.
    """
    with _memory_shown():
        return compile_in_buckets(graph_module, example_inputs, functools.partial(_compile, config=config, mode=mode))


def _compile(
    graph_module: GraphModule, example_inputs: Sequence[Any], config: MHCConfig, mode: str | None
) -> Callable[..., Any]:
    if config.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        patches = list_mode_options(mode) if mode is not None else None
        compiled: Any = compile_fx(graph_module, list(example_inputs), config_patches=patches)
        return compiled
    if mode is not None:
        raise MHCOptionError(f"mode={mode!r} is Inductor's; inner={config.inner!r} has no modes. Leave one out.")
    return _lookup(config.inner)(graph_module, list(example_inputs))


def _lookup(name: str) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import list_backends, lookup_backend
    from torch._dynamo.exc import InvalidBackend

    if name == "mhc":
        raise MHCOptionError("inner='mhc' would rewrite the rewritten graph. Use 'inductor' or 'aot_eager'.")
    try:
        return lookup_backend(name)
    except InvalidBackend as error:
        known = ", ".join(sorted({*list_backends(), "aot_eager", "eager"} - {"mhc"}))
        raise MHCOptionError(f"inner={name!r} is no Dynamo backend. Known here: {known}.") from error


@contextlib.contextmanager
def _memory_shown() -> Iterator[None]:
    """Under TORCH_LOGS=mhc_memory, show how each joint graph that is compiled inside is partitioned.

    What is saved is known only behind the partitioner. Inductor has an option for another partitioner, aot_eager has
    none; every backend built on AOTAutograd hands its own to `aot_module_simplified` under the keyword `partition_fn`
    (torch 2.11 to 2.15), so that is where it is wrapped. A graph from AOTAutogradCache is never partitioned: while the
    log is on, that cache is off.
    """
    logger = logs.artifact("mhc_memory")
    if not logger.isEnabledFor(logging.DEBUG):
        yield
        return
    from torch._dynamo.backends import common
    from torch._functorch import config as functorch_config

    compile_joint = common.aot_module_simplified

    def watched(*args: Any, **keywords: Any) -> Any:
        partition = keywords.get("partition_fn")
        if partition is not None:
            keywords["partition_fn"] = _described(partition, logger)
        return compile_joint(*args, **keywords)

    with (
        mock.patch.object(common, "aot_module_simplified", watched),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield


def _described(partition: Callable[..., Any], logger: logging.Logger) -> Callable[..., Any]:
    @functools.wraps(partition)
    def described(*args: Any, num_fwd_outputs: int, **keywords: Any) -> Any:
        forward, backward = partition(*args, num_fwd_outputs=num_fwd_outputs, **keywords)
        logger.debug("%s", describe_memory(forward, backward, num_fwd_outputs))
        return forward, backward

    return described
