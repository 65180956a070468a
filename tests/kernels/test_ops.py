"""Registration: every row of the table passes opcheck, is opaque to compilers, and equals its reference."""

import pytest
import torch
from mhc_compile.kernels.fusions import HALVES
from mhc_compile.kernels.ops import OPERATORS

from mhc_compile import functional

N, WIDTH, TOKENS = 3, 5, (2, 4)


def _samples():
    def draw(*shape):
        return torch.randn(*shape).requires_grad_()

    streams = draw(*TOKENS, N, WIDTH)
    site = (draw(N * N + 2 * N, N * WIDTH), draw(3), draw(N * N + 2 * N))
    coefficients = (draw(*TOKENS, N), draw(*TOKENS, N, N))
    measured = (torch.rand(*TOKENS, N), torch.rand(*TOKENS, N, N), torch.rand(*TOKENS, N * N + 2 * N + 1))
    constants = (20, 1e-6, 0.0, "sinkhorn")
    norm, normed = (draw(WIDTH), draw(WIDTH)), (*constants, 1e-5, True)
    return {
        "sinkhorn": (draw(*TOKENS, N, N), 20, 0.0),
        "pre": (streams, *site, *constants, False, False, [1e-6, 0.0, 1e-6]),
        "paper_pre": (streams, *site, *constants),
        "post": (streams, draw(*TOKENS, WIDTH), *coefficients),
        "post_pre": (streams, draw(*TOKENS, WIDTH), *coefficients, *site, *constants),
        "head": (streams, draw(N, N * WIDTH), draw(1), draw(N), 1e-6, 0.0),
        "measure": (streams, *site, *constants),
        "collapse": (streams, *site, *measured, *constants),
        "post_measure": (streams, draw(*TOKENS, WIDTH), *coefficients, *site, *constants),
        "post_collapse": (streams, draw(*TOKENS, WIDTH), *coefficients, *site, *measured, *constants),
        "pre_norm": (streams, *norm, *site, *normed),
        "post_pre_norm": (streams, draw(*TOKENS, WIDTH), *coefficients, *norm, *site, *normed),
        "collapse_norm": (streams, *norm, *site, *measured, *normed),
        "post_collapse_norm": (streams, draw(*TOKENS, WIDTH), *coefficients, *norm, *site, *measured, *normed),
    }


# Graphs, caches and exported programs know the operators by these.
_PARAMETERS = "Tensor phi, Tensor scale, Tensor bias"
_SITE = (
    "SymInt iters, float norm_eps, float eps, str manifold, bool anchored=False, bool transposed=False, "
    "float[] sinkhorn_eps=[]"
)
_HEAD = f"Tensor streams, {_PARAMETERS}"
_LAYOUT = "float norm_eps, float eps, bool anchored=False"
_MIXING = "Tensor streams, Tensor branch, Tensor post, Tensor res"
_MEASURED, _NEXT = "Tensor post, Tensor res, Tensor projection", "Tensor next_post, Tensor next_res, Tensor projection"
_GRADS = "Tensor grad_layer_input, Tensor grad_post, Tensor grad_res"
_NEXT_GRADS = "Tensor grad_fresh, Tensor grad_layer_input, Tensor grad_next_post, Tensor grad_next_res"
THREE, FOUR, FIVE, SIX, NINE = (f"({', '.join(['Tensor'] * count)})" for count in (3, 4, 5, 6, 9))
_NORM = "Tensor norm_weight, Tensor norm_bias"
_NORMED_SITE = _SITE.replace("str manifold, ", "str manifold, float layer_eps, bool centered, ")
_SAVED = "Tensor projection, Tensor statistics"
SCHEMAS = {
    "sinkhorn": "(Tensor logits, SymInt iters, float eps) -> Tensor",
    "sinkhorn_backward": "(Tensor grad_res, Tensor logits, SymInt iters, float eps) -> Tensor",
    "pre": f"(Tensor streams, {_PARAMETERS}, {_SITE}) -> {FOUR}",
    "paper_pre": f"(Tensor streams, {_PARAMETERS}, {_SITE}) -> {FOUR}",
    "pre_backward": f"({_GRADS}, Tensor streams, {_PARAMETERS}, Tensor projection, {_SITE}) -> {FOUR}",
    "measure": f"(Tensor streams, {_PARAMETERS}, {_SITE}) -> {THREE}",
    "collapse": f"(Tensor streams, {_PARAMETERS}, {_MEASURED}, {_SITE}) -> {THREE}",
    "post": f"({_MIXING}) -> Tensor",
    "post_backward": f"(Tensor grad_streams, {_MIXING}) -> {FOUR}",
    "post_pre": f"({_MIXING}, {_PARAMETERS}, {_SITE}) -> {FIVE}",
    "post_pre_backward": f"({_NEXT_GRADS}, {_MIXING}, {_PARAMETERS}, Tensor projection, {_SITE}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "post_measure": f"({_MIXING}, {_PARAMETERS}, {_SITE}) -> {THREE}",
    "post_collapse": f"({_MIXING}, {_PARAMETERS}, {_NEXT}, {_SITE}) -> {FOUR}",
    "pre_norm": f"(Tensor streams, {_NORM}, {_PARAMETERS}, {_NORMED_SITE}) -> {FIVE}",
    "pre_norm_backward": f"(Tensor grad_normed, Tensor grad_post, Tensor grad_res, Tensor streams, {_NORM}, "
    f"{_PARAMETERS}, {_SAVED}, {_NORMED_SITE}) -> {SIX}",
    "collapse_norm": f"(Tensor streams, {_NORM}, {_PARAMETERS}, {_MEASURED}, {_NORMED_SITE}) -> {FOUR}",
    "post_pre_norm": f"({_MIXING}, {_NORM}, {_PARAMETERS}, {_NORMED_SITE}) -> {SIX}",
    "post_pre_norm_backward": f"({_NEXT_GRADS.replace('layer_input', 'normed')}, {_MIXING}, {_NORM}, {_PARAMETERS}, "
    f"{_SAVED}, {_NORMED_SITE}) -> {NINE}",
    "post_collapse_norm": f"({_MIXING}, {_NORM}, {_PARAMETERS}, {_NEXT}, {_NORMED_SITE}) -> {FIVE}",
    "head": f"({_HEAD}, {_LAYOUT}) -> (Tensor, Tensor)",
    "head_backward": f"(Tensor grad_output, {_HEAD}, Tensor projection, {_LAYOUT}) -> {FOUR}",
}
# Operators that share another's backward, and those that have none.
BACKWARDS = {
    "paper_pre": "pre", "collapse": "pre", "post_collapse": "post_pre", "measure": None, "post_measure": None,
    "collapse_norm": "pre_norm", "post_collapse_norm": "post_pre_norm",
}  # fmt: skip


def test_schemas():
    registered = {f"{name}_backward" for name in OPERATORS if name not in BACKWARDS}
    assert set(SCHEMAS) == {*OPERATORS, *registered}
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
    backward = BACKWARDS.get(name, name)
    if backward is None:
        assert not any(part.requires_grad for part in parts)
    else:
        sum(part.sum() for part in parts).backward()
    ours = [target for target in targets if target.startswith("mhc.")]
    assert sorted(ours) == sorted([f"mhc.{name}.default", *([f"mhc.{backward}_backward.default"] if backward else [])])


@pytest.mark.parametrize("name", sorted(HALVES))
def test_halves_are_the_whole(name):
    """Outputs and gradients: all of the whole's gradient is that of its second half."""
    arguments, (measure, collapse) = _samples()[name], (OPERATORS[half] for half in HALVES[name])
    signature = OPERATORS[name].signature
    tensors, constants = arguments[: len(signature.tensors)], arguments[len(signature.tensors) :]
    whole = OPERATORS[name].forward(*arguments)
    measured = measure.forward(*signature.shared_with(measure.signature, arguments))
    halves = collapse.forward(*tensors, *measured, *constants)
    made = dict(zip(signature.results, whole, strict=True))
    torch.testing.assert_close(tuple(halves), tuple(made[result] for result in collapse.signature.results))
    torch.testing.assert_close(measured[-1], made["projection"])
    count = len(signature.outputs)
    grads = [torch.randn_like(part) for part in whole[:count]]
    torch.testing.assert_close(
        torch.autograd.grad(halves[:count], tensors, grads), torch.autograd.grad(whole[:count], tensors, grads)
    )


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
