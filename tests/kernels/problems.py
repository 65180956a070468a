"""Random inputs for the operators, their float64 truth, and the accuracy contract."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mhc_compile.kernels import boundary, reference
from mhc_compile.kernels.dispatch import kernel_of, reference_of
from mhc_compile.kernels.fusions import HALVES
from mhc_compile.kernels.manifolds import MANIFOLDS
from mhc_compile.kernels.ops import OPERATORS as TABLE
from torch import Tensor

OPERATORS = ("sinkhorn", "pre", "paper_pre", "post", "post_pre", "head")
# There is no C++ for these.
NORMED = ("pre_norm", "post_pre_norm")
# `paper_pre` has none of its own: test_paper_pre.py shows that it is that of `pre`, function for function.
WITH_BACKWARD = tuple(operator for operator in OPERATORS if operator != "paper_pre")

# From the name of an operator, or of its backward, to an implementation.
FunctionOf = Callable[[str], Callable[..., Any]]


@dataclass(frozen=True)
class Problem:
    """Shapes, how large logits and gradients are, how the streams are stored, and which norm follows."""

    tokens: int
    n: int
    width: int
    dtype: torch.dtype = torch.float32
    manifold: str = "sinkhorn"
    iters: int = 20
    eps: float = 0.0
    logit_std: float = 1.0
    grad_scale: float = 1.0
    seed: int = 0
    anchored: bool = False
    centered: bool = True


def inputs(operator: str, problem: Problem, device: str = "cpu") -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Return an operator's (tensors, constants)."""
    generator = torch.Generator().manual_seed(problem.seed)
    tokens, n, width = problem.tokens, problem.n, problem.width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    family = MANIFOLDS[problem.manifold]
    rows = n if operator == "head" else family.rows(n)
    scales = 1 if operator == "head" else family.scales
    streams, branch = normal(tokens, n, width).to(problem.dtype), normal(tokens, width).to(problem.dtype)
    mixing = (normal(tokens, n).sigmoid() * 2, normal(tokens, n, n).softmax(-1))
    phi = problem.logit_std * normal(rows, n * width) / (n * width) ** 0.5
    mapping = (phi, normal(scales).abs() + 0.5, problem.logit_std * normal(rows))
    layout = (True,) if problem.anchored else ()
    site = (problem.iters, 1e-6, problem.eps, problem.manifold, *layout)
    normed_site = (*site[:4], 1e-5, problem.centered, *layout)
    logits = problem.logit_std * normal(tokens, n, n)
    norm = (normal(width).to(problem.dtype), normal(width).to(problem.dtype))
    return {
        "sinkhorn": ((logits,), (problem.iters, problem.eps)),
        "pre": ((streams, *mapping), site),
        "paper_pre": ((streams, *mapping), site),
        "post": ((streams, branch, *mixing), ()),
        "post_pre": ((streams, branch, *mixing, *mapping), site),
        "pre_norm": ((streams, *norm, *mapping), normed_site),
        "post_pre_norm": ((streams, branch, *mixing, *norm, *mapping), normed_site),
        "head": ((streams, *mapping), (1e-6, problem.eps, *layout)),
    }[operator]


def output_grads(outputs: Sequence[Tensor], problem: Problem) -> tuple[Tensor, ...]:
    """Return random gradients of differentiable outputs."""
    generator = torch.Generator().manual_seed(problem.seed + 1)
    return tuple(
        (problem.grad_scale * torch.randn(out.shape, generator=generator)).to(out.dtype).to(out.device)
        for out in outputs
    )


def many(result: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return one or several outputs as a tuple."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def double(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def assert_as_good(
    kernel: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype, what: str
) -> None:
    """Check |truth − kernel| ≤ |truth − plain PyTorch| + slack, in the largest entry of each tensor.

    The slack is 64 float32 roundings of the largest true entry, for sums taken in another order, and of a narrower
    dtype of that very tensor one rounding to it: which way a tie goes differs. Where streams (of `dtype`) are bfloat16,
    products take float32 factors in 16 bits: another 64. The gradients of a boundary's post and res are products with
    the gradient of its new streams, which is held in the streams' dtype: one rounding to that.
    """
    assert len(kernel) == len(plain) == len(truth)
    sizes = [true.abs().max().item() if true.numel() else 0.0 for true in truth]
    if len(truth) >= 4 and truth[-1].dim() == 1:
        # The gradient of scale sums the terms of bias's, which cancel: it errs by as much as they do.
        sizes[-2] = max(sizes[-2:])
    for index, (ours, theirs, true) in enumerate(zip(kernel, plain, truth, strict=True)):
        assert ours.shape == theirs.shape == true.shape
        assert ours.dtype == theirs.dtype
        if not true.numel():
            continue
        assert torch.isfinite(ours).all(), f"{what}: output {index} is not finite"
        error = (ours.double() - true).abs().max().item()
        allowed = (theirs.double() - true).abs().max().item()
        size = sizes[index]
        slack = (128 if dtype == torch.bfloat16 else 64) * torch.finfo(torch.float32).eps * max(size, 1e-3)
        behind_post = what.startswith(("post_pre_backward", "post_pre_norm_backward"))
        rounded = dtype if behind_post and index in (2, 3) else ours.dtype
        if rounded != torch.float32:
            slack += torch.finfo(rounded).eps / 2 * size
        assert error <= allowed + slack, f"{what}: output {index} errs by {error:.2e}, plain PyTorch {allowed:.2e}"


def differentiable(operator: str, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the outputs that have gradients: the projection has none."""
    return tuple(outputs[: len(TABLE[operator].signature.outputs)])


def run_backward(
    operator: str, arguments: Sequence[Tensor], constants: Sequence[Any], function_of: FunctionOf = kernel_of
) -> tuple[Tensor, ...]:
    """Run an operator's backward with what its forward keeps for it.

    Args:
        operator: its name.
        arguments: a gradient for each output, those without one left out or not, and the operator's tensors.
        constants: of the operator.
        function_of: the implementation.
    """
    tensors = arguments[-len(TABLE[operator].signature.inputs) :]
    outputs = many(function_of(operator)(*tensors, *constants))
    return backward_of(operator, arguments, outputs, tensors, constants, function_of)


def backward_of(
    operator: str,
    grads: Sequence[Tensor],
    outputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    constants: Sequence[Any],
    function_of: FunctionOf = kernel_of,
) -> tuple[Tensor, ...]:
    """Run an operator's backward with what its forward, whose `outputs` these are, kept for it; see `run_backward`."""
    count = len(TABLE[operator].signature.outputs)
    return many(function_of(f"{operator}_backward")(*grads[:count], *tensors, *outputs[count:], *constants))


def check(
    operator: str,
    problem: Problem,
    device: str = "cpu",
    function_of: FunctionOf = kernel_of,
    backward: bool = True,
) -> None:
    """Check an implementation of an operator, and of its backward if it has one of its own and it is wanted."""
    tensors, constants = inputs(operator, problem, device)
    exact = double(tensors)
    ours = many(function_of(operator)(*tensors, *constants))
    plain = many(reference_of(operator)(*tensors, *constants))
    truth = many(reference_of(operator)(*exact, *constants))
    assert_as_good(ours, plain, truth, problem.dtype, f"{operator} {problem}")
    if backward and operator in (*WITH_BACKWARD, *NORMED):
        grads = output_grads(differentiable(operator, plain), problem)
        ours = backward_of(operator, grads, ours, tensors, constants, function_of)
        plain = backward_of(operator, grads, plain, tensors, constants, reference_of)
        truth = backward_of(operator, double(grads), truth, exact, constants, reference_of)
        assert_as_good(ours, plain, truth, problem.dtype, f"{operator}_backward {problem}")


def check_halves(operator: str, problem: Problem, device: str = "cpu", function_of: FunctionOf = kernel_of) -> None:
    """Check that an operator's halves together give what it gives, and so each is as good."""
    tensors, constants = inputs(operator, problem, device)
    whole = function_of(operator)(*tensors, *constants)
    measure, collapse = HALVES[operator]
    given = TABLE[operator].signature.shared_with(TABLE[measure].signature, (*tensors, *constants))
    measured = function_of(measure)(*given)
    again = function_of(collapse)(*tensors, *measured, *constants)
    names = (*TABLE[collapse].signature.results, "projection")
    wanted_of = dict(zip(TABLE[operator].signature.results, whole, strict=True))
    for name, ours in zip(names, (*again, measured[-1]), strict=True):
        wanted = wanted_of[name]
        torch.testing.assert_close(ours, wanted, rtol=torch.finfo(ours.dtype).eps, atol=2e-6)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its name, grid, tensors and options."""

    kernel: str
    grid: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    options: dict[str, Any]


def launches(operator: str, problem: Problem) -> tuple[list[Launch], list[Launch]]:
    """Return what an operator's forward and backward launch on meta tensors; nothing runs."""
    from mhc_compile.kernels.gpu.launch import recording

    found: list[Launch] = []

    def record(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tensors = tuple(arg for arg in args if isinstance(arg, Tensor))
        found.append(Launch(kernel.__name__, grid, tensors, options))

    tensors, constants = inputs(operator, problem)
    tensors = tuple(tensor.to("meta") for tensor in tensors)
    with recording(record):
        outputs = many(kernel_of(operator)(*tensors, *constants))
        forward = len(found)
        count = len(TABLE[operator].signature.outputs)
        kernel_of(f"{operator}_backward")(*outputs[:count], *tensors, *outputs[count:], *constants)
    return found[:forward], found[forward:]


def rounded_truth(problem: Problem, device: str = "cpu") -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Float64 `post_pre` and its gradients, the new streams rounded to their dtype as they are stored."""
    tensors, constants = inputs("post_pre", problem, device)
    fresh = reference.post(*double(tensors[:4])).to(problem.dtype).double()
    outputs = (fresh, *reference.pre(fresh, *double(tensors[4:]), *constants))
    grads = double(output_grads(boundary.post_pre(*tensors, *constants)[:4], problem))
    through, *mapping = reference.pre_backward(*grads[1:], fresh, *double(tensors[4:]), outputs[-1], *constants)
    return outputs, (*reference.post_backward(grads[0] + through, *double(tensors[:4])), *mapping)
