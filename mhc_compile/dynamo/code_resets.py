"""Take back what Dynamo has compiled for code objects, where no other thread is about to add to it."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterable
from types import CodeType

from torch._dynamo.convert_frame import CatchErrorsWrapper, compile_lock
from torch._dynamo.eval_frame import reset_code

from ..memory import MEMORY

_PATIENCE = 1.0
_PAUSE = 0.002


def reset_codes(codes: Iterable[CodeType]) -> None:
    """Let Dynamo forget these code objects, now or with the next ones.

    `reset_code` frees what Dynamo keeps for a code object. A thread that has asked Dynamo to compile a frame of it
    holds a pointer to that until it is done, also while it waits for its turn, and crashes afterwards (torch 2.13).
    What others keep busy for longer than a second is left for the next call; it only counts towards the recompile
    limit.
    """
    MEMORY.stale_codes.update(codes)
    deadline = time.monotonic() + _PATIENCE
    while MEMORY.stale_codes:
        with compile_lock:
            if not _others_compile():
                while MEMORY.stale_codes:
                    reset_code(MEMORY.stale_codes.pop())
                return
        if time.monotonic() > deadline:
            return
        time.sleep(_PAUSE)


def _others_compile() -> bool:
    """Return whether another thread is inside Dynamo, at work or waiting for its turn."""
    own = threading.get_ident()
    inside = CatchErrorsWrapper.__call__.__code__
    return any(
        frame.f_code is inside
        for thread, top in sys._current_frames().items()
        if thread != own
        for frame, _ in traceback.walk_stack(top)
    )
