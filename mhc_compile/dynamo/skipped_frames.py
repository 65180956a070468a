"""Notice when Dynamo gives up on a whole frame and never calls a backend, or is interrupted.

A graph break inside a loop does that: the frame runs as plain Python, the modules it calls are compiled one by one, and
a residual add of its own is rewritten by nobody. Dynamo tells no backend; its compile callbacks are where the exception
can be seen.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
import warnings
from typing import Any

import torch
from torch import nn
from torch.fx import Graph

from ..attachment.entrances import BACKEND_NAME
from ..attachment.site_parameters import attached_config
from ..config import MHCConfig
from ..errors import MHCWarning, StreamCutError
from ..memory import MEMORY
from ..passes.analyze import holds_residual_adds
from ..planning.graph_breaks import cut_message, remember_given_up


def watch_skipped_frames() -> None:
    """Register the callback; `torch._dynamo.reset()` clears it, so every compilation registers it anew."""
    try:
        from torch._dynamo.callback import callback_handler
    except ImportError:
        return
    with contextlib.suppress(ValueError):
        callback_handler.remove_end_callback(_after_compilation)
    callback_handler.register_end_callback(_after_compilation)


def _after_compilation(arguments: Any) -> None:
    from torch._dynamo.exc import Unsupported

    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, Exception):
        # An interrupt between two traces of a first call: no backend is at work to take back what it has attached.
        for model in list(MEMORY.undo):
            MEMORY.take_back(model)
    if not isinstance(error, Unsupported):
        return
    compilation = _compilation_frame()
    if compilation is None:
        return
    root = next((value for value in compilation["frame"].f_locals.values() if _is_built(value)), None)
    if root is None:
        return
    reason = _reason(error)
    remember_given_up(root, reason)
    function = compilation["code"].co_name
    config = _looked_at_with(compilation["compiler_fn"])
    if attached_config(root) is not None or (config is not None and config.on_graph_break == "carry"):
        return
    config = _config_of(compilation["compiler_fn"])
    if config.strict and config.on_graph_break != "collapse" and _shows_residual_adds(error):
        _refuse_children(
            root,
            StreamCutError(cut_message(f"{reason}, and Dynamo gave up on the whole of {function}")),
        )
        return
    warnings.warn(
        f"Dynamo gave up on {function} of {type(root).__name__}: {reason}. It runs as plain Python, and what it calls "
        "is compiled piece by piece; a residual add of its own is not rewritten.",
        MHCWarning,
        stacklevel=2,
    )


def _is_built(value: Any) -> bool:
    """Return whether a value is a module, and not one whose `__init__` is the frame that Dynamo gave up on."""
    return isinstance(value, nn.Module) and "_modules" in vars(value)


def _compilation_frame() -> dict[str, Any] | None:
    """Return the variables of Dynamo's `_compile`, if it is working for this backend."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        if frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals:
            compiler = frame.f_locals["compiler_fn"]
            # Under DistributedDataParallel it is a method of DDPOptimizer, which holds the backend.
            compiler = getattr(getattr(compiler, "__self__", None), "backend_compile_fn", compiler)
            ours = getattr(compiler, "compiler_name", None) == BACKEND_NAME
            return {**frame.f_locals, "compiler_fn": compiler} if ours else None
    return None


def _config_of(compiler: Any) -> MHCConfig:
    """Return the options of a compilation: those of `torch.compile`, or those that `attach` looks with."""
    return _looked_at_with(compiler) or MHCConfig(**(getattr(compiler, "kwargs", {}).get("options") or {}))


def _looked_at_with(compiler: Any) -> MHCConfig | None:
    """Return the options that `attach` or `explain` looks at a model with; None for a compilation."""
    looking = getattr(getattr(compiler, "compiler_fn", None), "mhc_look", None)
    return looking if isinstance(looking, MHCConfig) else None


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    stack = getattr(error, "real_stack", None)
    where = f" ({stack[-1].filename}:{stack[-1].lineno}  {stack[-1].line or ''})" if stack else ""
    return (lines[0] if lines else type(error).__name__) + where


def _shows_residual_adds(error: BaseException) -> bool:
    """Return whether the part that was traced before the break already shows a residual add."""
    graph = _traced_so_far(error)
    return graph is not None and holds_residual_adds(graph)


def _traced_so_far(error: BaseException) -> Graph | None:
    """Return the graph of the translator that raised; it hangs on no object that outlives the traceback."""
    traceback = error.__traceback__
    while traceback is not None:
        output = getattr(traceback.tb_frame.f_locals.get("self"), "output", None)
        graph = getattr(output, "graph", None)
        if isinstance(graph, Graph):
            return graph
        traceback = traceback.tb_next
    return None


def _refuse_children(root: nn.Module, error: StreamCutError) -> None:
    """Raise from the first child that the fallen frame calls; the hooks then take themselves off."""
    handles: list[Any] = []

    @torch.compiler.disable
    def refuse(module: nn.Module, arguments: Any) -> None:
        for handle in handles:
            handle.remove()
        raise error

    handles += [module.register_forward_pre_hook(refuse) for module in root.modules() if module is not root]
