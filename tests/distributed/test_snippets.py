"""The README's snippets for several processes run."""

from __future__ import annotations

from .launch import outcomes
from .snippets import SNIPPETS


def test_each_snippet_trains_the_parameters() -> None:
    assert len(SNIPPETS) == 4
    first, second = outcomes("snippets")
    for number in range(len(SNIPPETS)):
        trained = [outcome[str(number)].get("trained", outcome[str(number)]) for outcome in (first, second)]
        # Of a pipeline each rank has its own layers.
        assert len({*trained[0], *trained[1]}) == 12, trained
