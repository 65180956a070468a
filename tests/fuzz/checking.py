"""Check one random program: its sites, that it starts as the plain function, and the oracle."""

from __future__ import annotations

import collections
import copy
import itertools
import re
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

import mhc_compile
from mhc_compile import MHCConfig

from ..perturbed import compare, outputs_and_gradients, widened
from .programs import WIDTH, Program

_COUNT = itertools.count()


@dataclass(frozen=True)
class Options:
    """What a program is compiled with."""

    n_streams: int = 2
    manifold: str = "sinkhorn"
    readout: str = "mean"
    fusion: str = "site"
    inner: str = "eager"


def options(inner: str = "eager") -> st.SearchStrategy[Options]:
    """Draw options; the first of each is what a failure shrinks to."""
    return st.builds(
        Options,
        st.sampled_from((2, 3, 1, 4)),
        st.sampled_from(("sinkhorn", "none", "identity")),
        st.sampled_from(("mean", "learned")),
        st.sampled_from(("site", "boundary", "inductor")),
        st.just(inner),
    )


def check(program: Program, chosen: Options) -> None:
    """Raise AssertionError, with the program's source, where something is wrong."""
    torch._dynamo.reset()
    file = f"<program {next(_COUNT)}>"
    model, inputs = program.build(file)
    try:
        parameters = dict(model.double().named_parameters())
        outputs_and_gradients(model, parameters, widened(inputs), {})
    except RuntimeError as error:  # autograd refuses: a value that it needs was changed in place
        assume("modified by an inplace operation" not in str(error) and "leaf Variable" not in str(error))
        raise
    config = MHCConfig(
        n_streams=chosen.n_streams, manifold=chosen.manifold, readout=chosen.readout, min_sites=1, strict=False
    )
    text = f"\n{program.source}\n{chosen}"
    plain = copy.deepcopy(model)
    report = mhc_compile.attach(model, *widened(inputs), config=config)
    found = collections.Counter(int(re.search(r">:(\d+)", site.location)[1]) for site in report.sites)
    for line in sorted({*found, *program.expected}):
        wanted = program.expected.get(line, 0)
        where = f"line {line}: {program.source.splitlines()[line - 1].strip()}"
        assert wanted is None or found[line] == wanted, f"{where}: {found[line]} sites, not {wanted}{text}\n{report}"
    for site in report.sites:
        assert site.width == WIDTH, f"{site.location}: {site.width} features, not {WIDTH}{text}"
    if not found:
        return
    more: dict[str, Any] = {"inner": chosen.inner, "fusion": chosen.fusion}
    try:
        _, differences = compare(
            model, inputs, config=config, options=more, double=True, floor=1e-6, seeds=(None, 0),
            attached=(plain, report),
        )  # fmt: skip
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:600]}{text}") from error
    for (out, gradient, name), other in zip(differences, ("the plain model at the start", "the oracle"), strict=True):
        assert out <= 1e-5, f"outputs differ from {other} by {out:.1e}{text}"
        assert gradient <= 1e-4, f"the gradient of {name} differs from {other} by {gradient:.1e}{text}"
