"""Registration: every row of the table passes opcheck, is opaque to compilers, and equals its reference."""

import pytest
import torch
from mhc_compile.kernels.manifolds import MANIFOLDS, Manifold
from mhc_compile.kernels.ops import OPERATORS

from mhc_compile import functional

N, WIDTH, TOKENS = 3, 5, (2, 4)


def _samples():
    def draw(*shape):
        return torch.randn(*shape).requires_grad_()

    streams = draw(*TOKENS, N, WIDTH)
    site = (draw(N * N + 2 * N, N * WIDTH), draw(3), draw(N * N + 2 * N))
    coefficients = (draw(*TOKENS, N), draw(*TOKENS, N, N))
    constants = (20, 1e-6, 0.0, "sinkhorn")
    return {
        "sinkhorn": (draw(*TOKENS, N, N), 20, 0.0),
        "pre": (streams, *site, *constants),
        "paper_pre": (streams, *site, *constants),
        "post": (streams, draw(*TOKENS, WIDTH), *coefficients),
        "post_pre": (streams, draw(*TOKENS, WIDTH), *coefficients, *site, *constants),
        "head": (streams, draw(N, N * WIDTH), draw(1), draw(N), 1e-6, 0.0),
    }


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_opcheck(name):
    torch.library.opcheck(OPERATORS[name].forward, _samples()[name])


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_opaque_to_the_compiler(name):
    """One node each for forward and backward, however many iterations."""
    targets = []

    def collect(graph_module, inputs):
        targets.extend(str(node.target) for node in graph_module.graph.nodes if node.op == "call_function")
        return graph_module

    from torch._dynamo.backends.common import aot_autograd

    operator, arguments = OPERATORS[name].forward, _samples()[name]
    compiled = torch.compile(
        lambda *inputs: operator(*inputs), backend=aot_autograd(fw_compiler=collect, bw_compiler=collect)
    )
    result = compiled(*arguments)
    parts = result if isinstance(result, tuple | list) else (result,)
    sum(part.sum() for part in parts).backward()
    ours = [target for target in targets if target.startswith("mhc.")]
    # The paper's split differs in its forward alone.
    backward = name.removeprefix("paper_") + "_backward"
    assert sorted(ours) == sorted([f"mhc.{name}.default", f"mhc.{backward}.default"])


def test_non_contiguous_inputs():
    streams = torch.randn(4, 6, N, WIDTH)
    branch, post, res = torch.randn(4, 6, WIDTH), torch.rand(4, 6, N), torch.rand(4, 6, N, N)
    wanted = functional.post(streams, branch, post, res)
    strided = streams.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(functional.post(strided, branch, post, res.mT.contiguous().mT), wanted)
    expanded = torch.randn(4, 6, 1, WIDTH).expand(4, 6, N, WIDTH)
    torch.testing.assert_close(
        functional.post(expanded, branch, post, res),
        functional.post(expanded.contiguous(), branch, post, res),
    )


def test_a_second_derivative_is_refused_rather_than_wrong():
    logits = torch.randn(2, N, N, requires_grad=True)
    (first,) = torch.autograd.grad(functional.sinkhorn(logits).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.sum(), logits)


def test_the_registry_takes_another_manifold(monkeypatch):
    import mhc_compile
    from tests.models import QUICK, Stack, features

    def project(logits, iters, eps):
        return torch.softmax(logits, -1)

    def project_backward(grad, logits, iters, eps):
        rows = torch.softmax(logits, -1)
        return rows * (grad - (grad * rows).sum(-1, keepdim=True))

    row = Manifold("row", project, project_backward, rest_bias=lambda n: 8 * torch.eye(n))
    monkeypatch.setitem(MANIFOLDS, "row", row)
    model = Stack()
    plain = model(features())
    mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(manifold="row"))
    rewritten = torch.compile(model, backend="mhc", options=QUICK)(features())
    torch.testing.assert_close(rewritten, plain, rtol=1e-5, atol=1e-6)
    rewritten.sum().backward()
    bias = mhc_compile.parameters(model)["blocks.1.mhc.mlp.bias"]
    assert bias.grad[8:].abs().max() > 0
