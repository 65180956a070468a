"""Random residual programs: the sites are the true ones, the start is the plain function, and the oracle agrees.

A failure is shrunk, and shows the program's source. `python -m tests.fuzz --programs 2000` runs longer.
"""

from hypothesis import HealthCheck, given, settings

from .checking import Options, check, options
from .programs import Program, programs


@settings(max_examples=200, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(programs(), options())
def test_random_programs(program, chosen):
    check(program, chosen)


def test_a_branch_that_calls_a_child_twice():
    gated = Program("Toolbox", lines=["x = x + self.a(x) * torch.sigmoid(self.a(x))"], sites=[None])
    check(gated, Options())
