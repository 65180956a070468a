"""Ctrl-C while attaching or compiling leaves the model as it was; `python -m tests.soak` tries more places."""

import pytest

from .interrupting import attach, check, first_call, places


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("call", "attached"), [(attach, False), (first_call, False), (first_call, True)], ids=["attach", "first", "compile"]
)
def test_an_interrupt(call, attached):
    interrupted = [check(call, at, attached)[1] for at in places(call, attached, 4)]
    assert sum(bool(where) for where in interrupted) >= 3
