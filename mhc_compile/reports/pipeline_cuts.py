"""Where to cut a model into pipeline stages: the slowest stage as fast as can be, and then the fullest as empty."""

from __future__ import annotations

from collections.abc import Callable

# Cuts whose slowest stage is slower than that of the best by less than this are as good; memory then decides.
SLACK = 0.02


def propose_cuts(
    pieces: int, stages: int, seconds: Callable[[int, int], float], held: Callable[[int, int, int], float]
) -> tuple[int, ...]:
    """Return where each stage ends, as the number of pieces up to there.

    Args:
        pieces: their number, at least that of the stages.
        stages: their number.
        seconds: of a microbatch in a stage that has the pieces from the first up to the second number.
        held: bytes that a stage holds, by its number and its pieces.
    """
    fastest, _ = _least(pieces, stages, lambda stage, start, end: seconds(start, end))
    limit = fastest * (1 + SLACK)

    def cost(stage: int, start: int, end: int) -> float:
        return held(stage, start, end) if seconds(start, end) <= limit else float("inf")

    return _least(pieces, stages, cost)[1]


def _least(pieces: int, stages: int, cost: Callable[[int, int, int], float]) -> tuple[float, tuple[int, ...]]:
    """Return the least possible cost of the costliest stage, and the ends of the stages; of equals, the most even."""
    # By the number of pieces that the stages so far hold: costliest stage, squares of the sizes, ends.
    best: dict[int, tuple[float, int, tuple[int, ...]]] = {0: (0.0, 0, ())}
    for stage in range(stages):
        following: dict[int, tuple[float, int, tuple[int, ...]]] = {}
        for start, (most, squares, ends) in best.items():
            for end in range(start + 1, pieces - (stages - 1 - stage) + 1):
                found = (max(most, cost(stage, start, end)), squares + (end - start) ** 2, (*ends, end))
                if end not in following or found < following[end]:
                    following[end] = found
        best = following
    most, _, ends = best[pieces]
    return most, ends
