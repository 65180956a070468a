"""Registration and dispatch.

Which implementation runs, and that PyTorch's checks of custom operators pass.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from mhc_compile.kernels import dispatch, ops
from mhc_compile.kernels.dispatch import choosing, implementation, reference_of
from mhc_compile.kernels.fusions import HALVES
from mhc_compile.kernels.manifolds import MANIFOLDS, Manifold, sinkhorn_project, sinkhorn_project_backward

from mhc_compile import functional
from tests.kernels.problems import NORMED, OPERATORS, Problem, differentiable, inputs, many, output_grads


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("operator", [*OPERATORS, *NORMED])
def test_opcheck_of_the_kernels(operator, device):
    tensors, constants = inputs(operator, Problem(3, 3, 8), device)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    torch.library.opcheck(ops.OPERATORS[operator].forward, (*leaves, *constants))


def test_every_operator_is_in_the_table():
    assert set(ops.OPERATORS) == {*OPERATORS, *NORMED, *(half for halves in HALVES.values() for half in halves)}
    for name, operator in ops.OPERATORS.items():
        assert operator.reference is reference_of(name)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("operator", [*OPERATORS, *NORMED])
def test_autograd_through_the_kernels(operator, device):
    problem = Problem(5, 4, 16)
    tensors, constants = inputs(operator, problem, device)

    def gradients(call, leaves):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        outputs = differentiable(operator, many(call(*leaves, *constants)))
        return torch.autograd.grad(outputs, leaves, output_grads(outputs, problem))

    ours = gradients(ops.OPERATORS[operator].forward, tensors)
    plain = gradients(reference_of(operator), tensors)
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_public_post_pre_is_one_operator(device):
    tensors, _ = inputs("post_pre", Problem(3, 4, 8), device)
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda *args: functional.post_pre(*args))(*tensors).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert torch.ops.mhc.post_pre.default in called
    assert torch.ops.mhc.post.default not in called
    separate = functional.post(*tensors[:4])
    outputs = functional.post_pre(*tensors)
    assert torch.allclose(outputs[0], separate, atol=1e-6)
    for fused, alone in zip(outputs[1:], functional.pre(separate, *tensors[4:]), strict=True):
        assert torch.allclose(fused, alone, atol=1e-5)


@pytest.fixture
def no_kernels(monkeypatch):
    """Any call of a Triton kernel is an error."""

    def refuse(name):
        raise AssertionError(f"the kernel of {name} was called")

    monkeypatch.setattr(dispatch, "kernel_of", refuse)


def test_an_operator_without_cpp_takes_the_reference():
    tensors, constants = inputs("pre_norm", Problem(3, 4, 8))
    assert dispatch.compiled_of("pre_norm") is None
    with choosing("cpu"):
        ours = ops.OPERATORS["pre_norm"].forward(*tensors, *constants)
    torch.testing.assert_close(tuple(ours), reference_of("pre_norm")(*tensors, *constants))


@pytest.mark.usefixtures("no_kernels")
def test_cpu_takes_no_triton():
    with choosing("auto"):
        ops.pre(*(part for group in inputs("pre", Problem(3, 4, 8)) for part in group))
    # The override is what makes the difference.
    with choosing("triton"), pytest.raises(AssertionError, match="kernel of pre was called"):
        ops.pre(*(part for group in inputs("pre", Problem(3, 4, 8)) for part in group))


@pytest.mark.usefixtures("no_kernels", "kernels")
def test_what_the_kernels_do_not_cover_takes_the_reference(device, monkeypatch):
    tensors, constants = inputs("pre", Problem(3, 4, 8), device)
    assert ops.pre(*(tensor.double() for tensor in tensors), *constants)[0].dtype == torch.float64
    wide, _ = inputs("pre", Problem(3, 9, 8), device)
    assert ops.pre(*wide, *constants)[2].shape == (3, 9, 9)
    other = Manifold("sinkhorn", sinkhorn_project, sinkhorn_project_backward, rest_bias=torch.eye)
    monkeypatch.setitem(MANIFOLDS, "row", other)
    ops.pre(*tensors, *constants[:-1], "row")
    # A name of the table that is registered anew is another manifold as well.
    monkeypatch.setitem(MANIFOLDS, "sinkhorn", other)
    ops.pre(*tensors, *constants)


def test_choice_by_environment(monkeypatch):
    streams = torch.zeros(1, 2, 4)
    assert implementation((streams,), 2) != "triton"
    monkeypatch.setenv("MHC_KERNELS", "triton")
    assert implementation((streams,), 2) == "triton"
    monkeypatch.setenv("MHC_KERNELS", "reference")
    assert implementation((streams,), 2) == "reference"
    with choosing("triton"):
        assert implementation((streams,), 2) == "triton"
    with pytest.raises(ValueError, match="auto, triton, cpu, reference"), choosing("cuda"):
        pass


def test_operators_work_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import importlib.util, torch\n"
        "from mhc_compile import functional\n"
        "out = functional.sinkhorn(torch.randn(3, 4, 4))\n"
        "assert (out.sum(-1) - 1).abs().max() < 1e-6\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.usefixtures("kernels")
def test_compiles_into_one_graph_for_every_token_count(device):
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(lambda *args: functional.post_pre(*args), backend=backend, fullgraph=True, dynamic=True)
    # 5 is no other dimension here, which Dynamo would take to be the same one.
    for tokens in (5, 70, 9):
        tensors, constants = inputs("post_pre", Problem(tokens, 4, 8), device)
        for ours, plain in zip(call(*tensors), reference_of("post_pre")(*tensors, *constants)[:4], strict=True):
            assert torch.allclose(ours, plain, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.usefixtures("kernels")
def test_autocast_leaves_the_projection_alone(device):
    tensors, _ = inputs("pre", Problem(3, 4, 32), device)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = functional.pre(*tensors)
        with choosing("reference"):
            plain = functional.pre(*tensors)
    for ours, theirs in zip(inside, plain, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-6)
    assert (inside.res.sum(-1) - 1).abs().max() <= 1e-6
