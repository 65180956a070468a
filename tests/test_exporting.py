"""A rewritten model, exported: the same outputs in a process that never imports this package."""

import subprocess
import sys

import pytest
import torch
from torch.export import Dim

import mhc_compile
from mhc_compile import MHCError, NotAttachedError, UnrewrittenCallError

from .models import QUICK, BreaksBetween, Stack, features

ALONE = """
import sys, torch
program = torch.export.load(sys.argv[1])
assert not any("mhc" in str(node.target) for node in program.graph.nodes if node.op == "call_function")
for inputs, wanted in torch.load(sys.argv[2]):
    torch.testing.assert_close(program.module()(**inputs), wanted, rtol=1e-5, atol=1e-5)
assert not any(name.startswith("mhc_compile") for name in sys.modules)
print("ran alone")
"""


def perturbed(model, **inputs):
    # Each iteration is some nodes of every site; the number does not matter here.
    mhc_compile.attach(model, sinkhorn_iters=2, **inputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_program_runs_without_the_package_at_other_sizes(tmp_path):
    # A Hugging Face model goes the same way in the test of the README's snippets.
    model = perturbed(Stack(depth=1), features=features())
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    cases = [({"features": rows}, compiled(rows).detach()) for rows in (features(5), features(3), features(11))]
    program = mhc_compile.export(model, features=features(5), dynamic_shapes={"features": {0: Dim.DYNAMIC}})
    assert set(mhc_compile.parameters(model)) <= set(program.state_dict)
    torch.export.save(program, tmp_path / "model.pt2")
    torch.save(cases, tmp_path / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "model.pt2", tmp_path / "cases.pt"],
        capture_output=True,
        text=True,
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PATH": ""},
        check=False,
    )
    assert done.stdout == "ran alone\n", done.stderr[-2000:]


def test_positional_inputs_and_a_model_that_is_compiled_in_place():
    model = perturbed(Stack(), features=features())
    model.compile(backend="mhc", options=QUICK)
    program = mhc_compile.export(torch.compile(model), features())
    torch.testing.assert_close(program.module()(features()), model(features()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export_of_an_attached_model_fails_and_names_ours(strict):
    model = perturbed(Stack(), features=features())
    with pytest.raises(Exception, match=r"mhc_compile\.export\(model, \*args\)") as raised:
        torch.export.export(model, (features(),), strict=strict)
    assert strict or raised.type is UnrewrittenCallError


def test_what_cannot_be_exported_says_why():
    with pytest.raises(NotAttachedError, match=r"torch.export.export\(model"):
        mhc_compile.export(Stack(), features())
    with pytest.raises(MHCError, match="graph break"):
        mhc_compile.export(perturbed(BreaksBetween(), features=features()), features())
