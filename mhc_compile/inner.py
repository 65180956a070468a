"""Hand the rewritten graph to the inner compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from .config import MHCConfig
from .errors import MHCOptionError


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
