"""The table of fusion choices: what it says is what runs, what is counted, and what the help texts say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mhc_compile.kernels import ops
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.fusions import CANDIDATES, FUSIONS, KERNELS
from mhc_compile.kernels.gpu.launch import recording
from mhc_compile.passes.expand_streams import LOWERINGS

import mhc_compile
from mhc_compile import config
from tests.kernels.problems import NORMED, OPERATORS, Problem, launches
from tests.models import Stack, features

ROOT = Path(__file__).parents[2]


def _launched(run):
    found = set()
    with recording(lambda kernel, grid, args, options: found.add(kernel.__name__)):
        run()
    return found


@pytest.mark.parametrize("operator", [*OPERATORS, *NORMED])
@pytest.mark.parametrize("tokens", [3, 150])
def test_an_operator_launches_the_kernels_that_the_table_names(operator, tokens):
    forward, backward = launches(operator, Problem(tokens, 4, 64))
    assert {launch.kernel for launch in forward + backward} <= set(KERNELS[operator])


@pytest.mark.parametrize("choice", FUSIONS)
@pytest.mark.usefixtures("kernels")
def test_a_rewritten_model_runs_the_kernels_that_the_table_names(choice):
    model = Stack(1)
    mhc_compile.attach(model, features(), config=config.MHCConfig(sinkhorn_iters=3))
    compiled = torch.compile(model, backend="mhc", options={"inner": "aot_eager", "fusion": choice})

    def train():
        compiled(features()).sum().backward()

    train()
    found = _launched(train)
    assert found <= FUSIONS[choice].kernels
    assert ("paper_affine_kernel" in found) == (choice == "paper")
    # Joined or not, the same kernels run: those that mix within them are told by a constant.
    assert bool(found) == (choice != "inductor")


def test_every_table_lists_the_same_choices():
    assert set(config.FUSIONS) == {"auto", *FUSIONS} == set(LOWERINGS)
    assert list(traffic.PER_SITE) == list(FUSIONS)
    assert set(traffic.SITE_COSTS) == {fusion.cost for fusion in FUSIONS.values()}
    assert set(CANDIDATES) <= set(FUSIONS)
    assert set(KERNELS) == set(ops.OPERATORS)
    for fusion in FUSIONS.values():
        assert set(fusion.operators) <= set(ops.OPERATORS)


def test_candidates_of_auto_differ_in_joining_alone():
    # The graph is rewritten before the choice is made.
    assert {LOWERINGS[name] for name in CANDIDATES} == {LOWERINGS["auto"]}


def test_help_texts_say_what_the_table_says():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for fusion in FUSIONS.values():
        assert f'`"{fusion.name}"`: {fusion.help}' in readme
        assert f'"{fusion.name}"' in config.MHCConfig.__doc__
