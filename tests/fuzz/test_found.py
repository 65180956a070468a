"""Programs that the fuzzer found to be rewritten wrongly, by kind: each once failed."""

import pytest

from .checking import Options, check
from .programs import Program

FOUND = {
    "a branch that begins with an activation in place changes the skip, too": (
        ("h = self.a(F.relu(x, inplace=True))", 0),
        ("x = x + h", 1),
    ),
    "the same in the middle of a stream": (
        ("x = x + self.a(x)", 1),
        ("h = self.a(F.relu(x, inplace=True))", 0),
        ("x = x + h", 1),
    ),
    "a stream scaled in place is scaled for who reads its old name": (
        ("x = x + self.a(x)", 1),
        ("old = x", 0),
        ("x *= 0.5", 0),
        ("x = old + self.b(x)", 1),
    ),
    "an activation in place on what an add in place changed": (
        ("h = self.a(x)", 0),
        ("h.add_(x)", 1),
        ("x = F.relu(h, inplace=True)", 0),
        ("x = x + self.b(x)", 1),
    ),
    "a stream inside a branch that begins at the outer one's value": (
        ("x = x + self.a(x)", 1),
        ("h = x + self.b(x)", 1),
        ("h = h + self.c(h)", 1),
        ("x = x + self.d(h)", 1),
    ),
    "channels first, the first trained site behind a frozen one": (
        ("with torch.no_grad(): x = x + self.d(self.n(x))", 1),
        ("x = x + self.c(self.n(x))", 1),
    ),
}


@pytest.mark.parametrize("fusion", ["site", "boundary"])
@pytest.mark.parametrize("kind", sorted(FOUND))
def test_found(kind, fusion):
    program = Program("FeaturesFirst" if kind.startswith("channels first") else "Toolbox")
    for line, sites in FOUND[kind]:
        program.add(line, sites)
    # aot_eager takes in-place operations apart: what the eager backend refuses is silent there.
    check(program, Options(fusion=fusion, inner="aot_eager"))
