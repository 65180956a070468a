"""Any shape, layout and dtype of the inputs, any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mhc_compile.kernels import ops
from mhc_compile.kernels.dispatch import choosing, compiled_of, reference_of

from tests.kernels.problems import (
    OPERATORS,
    WITH_BACKWARD,
    Problem,
    assert_as_good,
    check,
    double,
    inputs,
    many,
    output_grads,
    run_backward,
)

pytestmark = pytest.mark.usefixtures("compiled")


def run(operator, problem, change=lambda tensor: tensor):
    """Return an operator's outputs and gradients, its inputs changed first."""
    tensors, constants = inputs(operator, problem)
    tensors = tuple(change(tensor) for tensor in tensors)
    outputs = many(compiled_of(operator)(*tensors, *constants))
    grads = tuple(change(grad) for grad in output_grads(outputs, problem))
    return (*outputs, *run_backward(operator, (*grads, *tensors), constants, compiled_of))


def assert_equal(ours, theirs):
    assert all(torch.equal(mine, yours) for mine, yours in zip(ours, theirs, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 20) | st.integers(31, 33),
    n=st.sampled_from([2, 4, 5]),
    width=st.integers(1, 100),
    operator=st.sampled_from(OPERATORS),
    manifold=st.sampled_from(["sinkhorn", "none", "identity", "row"]),
    anchored=st.booleans(),
    iters=st.integers(1, 9),
)
def test_any_shape(tokens, n, width, operator, manifold, anchored, iters):
    layout = anchored and operator not in ("sinkhorn", "post")
    manifold = "sinkhorn" if operator in ("head", "post", "sinkhorn") else manifold
    problem = Problem(tokens, n, width, manifold=manifold, iters=iters, anchored=layout)
    check(operator, problem, function_of=compiled_of)


@pytest.mark.parametrize("operator", WITH_BACKWARD)
def test_no_tokens(operator):
    tensors, constants = inputs(operator, Problem(0, 4, 24))
    outputs = many(compiled_of(operator)(*tensors, *constants))
    expected = many(reference_of(operator)(*tensors, *constants))
    assert [out.shape for out in outputs] == [out.shape for out in expected]
    grads = run_backward(operator, (*outputs, *tensors), constants, compiled_of)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in tensors]
    assert not any(grad.any() for grad in grads)


def _scattered(tensor):
    """The same values, strided in every dimension and off the start of their storage."""
    big = torch.full([2 * size + 1 for size in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = big[tuple(slice(1, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    assert view.numel() == 1 or not view.is_contiguous()
    return view


def _unaligned(tensor):
    """The same values, an element off the start of their storage."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("change", [_scattered, _unaligned])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", WITH_BACKWARD)
def test_strides_and_offsets(operator, dtype, change):
    problem = Problem(21, 4, 32, dtype)
    assert_equal(run(operator, problem, change), run(operator, problem))


@pytest.mark.parametrize("operator", ["pre", "post", "post_pre", "head"])
def test_expanded_inputs(operator):
    # What a chain begins with: n views of one hidden state; and gradients as sum() leaves them.
    tensors, constants = inputs(operator, Problem(5, 4, 24))
    streams = tensors[0][:, :1].expand(5, 4, 24)
    outputs = many(compiled_of(operator)(streams, *tensors[1:], *constants))
    assert_equal(outputs, many(compiled_of(operator)(streams.contiguous(), *tensors[1:], *constants)))
    grads = tuple(torch.ones((), dtype=out.dtype).expand(out.shape) for out in outputs)
    dense = tuple(grad.contiguous() for grad in grads)
    ours = run_backward(operator, (*grads, streams, *tensors[1:]), constants, compiled_of)
    theirs = run_backward(operator, (*dense, streams.contiguous(), *tensors[1:]), constants, compiled_of)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("operator", ["pre", "post_pre"])
def test_leading_dimensions(operator):
    tensors, constants = inputs(operator, Problem(6, 4, 24))
    per_token = len(tensors) - 3
    folded = tuple(tensor.unflatten(0, (2, 3)) for tensor in tensors[:per_token])
    outputs = compiled_of(operator)(*folded, *tensors[per_token:], *constants)
    expected = compiled_of(operator)(*tensors, *constants)
    assert all(ours.shape[:2] == (2, 3) for ours in outputs)
    assert_equal([ours.flatten(0, 1) for ours in outputs], expected)
    one = compiled_of(operator)(*(tensor[0] for tensor in tensors[:per_token]), *tensors[per_token:], *constants)
    assert all(torch.allclose(ours, whole[0], atol=1e-6) for ours, whole in zip(one, expected, strict=True))


def test_half_precision_parameters():
    # model.half() converts phi, scale and bias too.
    tensors, constants = inputs("pre", Problem(5, 4, 24, torch.float16))
    halves = (tensors[0], *(tensor.half() for tensor in tensors[1:]))
    outputs = compiled_of("pre")(*halves, *constants)
    assert torch.allclose(outputs[2], reference_of("pre")(*halves, *constants)[2], atol=1e-6)
    grads = run_backward("pre", (*output_grads(outputs, Problem(5, 4, 24)), *halves), constants, compiled_of)
    assert [grad.dtype for grad in grads] == [torch.float16] * 4


# Streams in float32 with branches in bfloat16 are what autocast leaves; the other way round rounds at the end alone.
@pytest.mark.parametrize(
    ("streams", "branch"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str
)
@pytest.mark.parametrize("operator", ["post", "post_pre"])
def test_a_branch_of_another_dtype(operator, streams, branch):
    problem = Problem(21, 4, 40, streams)
    tensors, constants = inputs(operator, problem)
    tensors = (tensors[0], tensors[1].to(branch), *tensors[2:])
    outputs = many(reference_of(operator)(*tensors, *constants))
    grads = output_grads(outputs, problem)
    count = len(ops.OPERATORS[operator].signature.outputs)
    backward = (*grads[:count], *tensors, *outputs[count:])
    for name, arguments in ((operator, tensors), (f"{operator}_backward", backward)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = many(compiled_of(name)(*arguments, *constants))
        plain = many(reference_of(name)(*arguments, *constants))
        truth = many(reference_of(name)(*double(arguments), *constants))
        assert_as_good(ours, plain, truth, torch.bfloat16, name)


@pytest.mark.parametrize("operator", WITH_BACKWARD)
def test_neither_the_run_nor_the_threads_change_a_bit(operator):
    # Few panels of phi (split by rows) and many; chunks that do not divide by the threads.
    threads = torch.get_num_threads()
    for problem in (Problem(90, 4, 40), Problem(70, 4, 1100, torch.bfloat16)):
        runs = []
        try:
            for count in (1, 1, 2, 3):
                torch.set_num_threads(count)
                runs.append(run(operator, problem))
        finally:
            torch.set_num_threads(threads)
        for other in runs[1:]:
            assert_equal(runs[0], other)


def test_calls_from_several_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    problems = [Problem(40, 4, width, anchored=True) for width in (8, 24, 1100, 16)]
    expected = [run("post_pre", problem) for problem in problems]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda problem: run("post_pre", problem), problems * 3)
        for ours, theirs in zip(found, expected * 3, strict=True):
            assert_equal(ours, theirs)


@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator):
    tensors, constants = inputs(operator, Problem(3, 4, 8))
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    with choosing("cpu"):
        torch.library.opcheck(ops.OPERATORS[operator].forward, (*leaves, *constants))
