"""Say what is being done, once it takes longer than a person waits without wondering."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_S = 2.0


@contextmanager
def sign_of_life(what: str) -> Iterator[None]:
    """Inside, one line goes to a terminal's standard error after two seconds; nothing to a file or a pipe."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(_PATIENCE_S, _say, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _say(what: str) -> None:
    print(f"mhc-compile: {what} …", file=sys.stderr, flush=True)
