"""How often a model's shared modules were called before a graph break: the graph behind it goes on counting.

A block that is called three times owns three times its sites. Where a break lies between the calls, each graph sees
only some of them, and without this the third call's sites would be taken for the first's.
"""

from __future__ import annotations

from collections import Counter

from ..dynamo.frames import Frame
from ..memory import MEMORY

# Calls by (id of the owner, label).
Calls = Counter[tuple[int, str]]


def calls_before(frame: Frame) -> Calls:
    """Return the calls that lie before a frame, if it resumes behind a graph break; none otherwise.

    A break is told by its source line, not by the order in which graphs are compiled: that changes with recompilation.
    """
    if frame.model is None or frame.resumed_line is None:
        return Counter()
    return Counter(MEMORY.calls.get(frame.model, {}).get(frame.resumed_line, Counter()))


def remember_calls(frame: Frame, calls: Calls) -> None:
    """Remember the calls up to the graph break that ends a frame's graph."""
    if frame.model is not None and frame.break_line is not None:
        MEMORY.calls.setdefault(frame.model, {})[frame.break_line] = Counter(calls)
