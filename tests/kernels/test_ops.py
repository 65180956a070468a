"""Registration: every row of the table passes opcheck, is opaque to compilers, and equals its reference."""

import pytest
import torch
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


# Graphs, caches and exported programs know the operators by these.
_SITE = "Tensor phi, Tensor scale, Tensor bias, SymInt iters, float norm_eps, float eps, str manifold, "
_SITE += "bool anchored=False, bool transposed=False"
_HEAD = "Tensor streams, Tensor phi, Tensor scale, Tensor bias, float norm_eps, float eps, bool anchored=False"
_MIXING = "Tensor streams, Tensor branch, Tensor post, Tensor res"
_NEXT = "Tensor grad_layer_input, Tensor grad_next_post, Tensor grad_next_res"
SCHEMAS = {
    "sinkhorn": "(Tensor logits, SymInt iters, float eps) -> Tensor",
    "sinkhorn_backward": "(Tensor grad_res, Tensor logits, SymInt iters, float eps) -> Tensor",
    "pre": f"(Tensor streams, {_SITE}) -> (Tensor, Tensor, Tensor)",
    "paper_pre": f"(Tensor streams, {_SITE}) -> (Tensor, Tensor, Tensor)",
    "pre_backward": f"(Tensor grad_layer_input, Tensor grad_post, Tensor grad_res, Tensor streams, {_SITE}) -> "
    "(Tensor, Tensor, Tensor, Tensor)",
    "post": f"({_MIXING}) -> Tensor",
    "post_backward": f"(Tensor grad_streams, {_MIXING}) -> (Tensor, Tensor, Tensor, Tensor)",
    "post_pre": f"({_MIXING}, {_SITE}) -> (Tensor, Tensor, Tensor, Tensor)",
    "post_pre_backward": f"(Tensor grad_fresh, {_NEXT}, {_MIXING}, {_SITE}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "head": f"({_HEAD}) -> Tensor",
    "head_backward": f"(Tensor grad_output, {_HEAD}) -> (Tensor, Tensor, Tensor, Tensor)",
}


def test_schemas():
    registered = {operator: f"{operator}_backward" for operator in OPERATORS if operator != "paper_pre"}
    assert set(SCHEMAS) == {*OPERATORS, *registered.values()}
    for name, schema in SCHEMAS.items():
        assert str(getattr(torch.ops.mhc, name).default._schema) == f"mhc::{name}{schema}"


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
