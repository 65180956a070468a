"""Let errors out of Dynamo as themselves, and have it trace a frame anew."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis

from ..errors import MHCError

Compiled = Callable[..., Any]


def errors_reach_the_user(backend: Compiled) -> Compiled:
    """Let an MHCError out of Dynamo as itself, rather than as BackendCompilerFailed.

    Dynamo lets exceptions of the type ShortenTraceback pass. Under `suppress_errors` it would fall back to the plain
    model instead, so there the compiled function raises.
    """

    @functools.wraps(backend)
    def wrapped(*args: Any, **kwargs: Any) -> Compiled:
        try:
            return backend(*args, **kwargs)
        except MHCError as error:
            if torch._dynamo.config.suppress_errors:
                return _raiser(error)
            raise _passing(type(error))(str(error)) from error

    return wrapped


def _raiser(error: MHCError) -> Compiled:
    def refuse(*inputs: Any) -> Any:
        raise error

    return refuse


def _passing(kind: type[MHCError]) -> type[MHCError]:
    """Return a subclass of an error that Dynamo lets pass."""

    def construct(self: Any, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)

    return type(kind.__name__, (kind, ShortenTraceback), {"__init__": construct, "__module__": kind.__module__})


class TraceAnew(TensorifyScalarRestartAnalysis):
    """What Dynamo takes from a backend as the wish to trace the frame once more (torch 2.11 to 2.15)."""


def trace_anew(why: str) -> NoReturn:
    """Leave the backend and have Dynamo trace the frame once more: hooks have been put on its modules meanwhile."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    # It checks that a second trace takes the steps of the first; this one will not.
    InstructionTranslator.current_tx().speculation_log.clear()
    raise TraceAnew(restart_reason=why)
