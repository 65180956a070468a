"""The cost model: the paper's table, what the kernels really launch, and what is saved for the backward."""

from __future__ import annotations

import math

import pytest
import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.dispatch import kernel_of, reference_of
from mhc_compile.kernels.gpu.launch import recording
from mhc_compile.kernels.gpu.stream_gradients import token_splits

from tests.kernels.problems import Problem, inputs, many

WIDTH = 4096
MANY = 8192


def rows(moved: traffic.Traffic, n: int = 4, tokens: int = MANY, width: int = WIDTH) -> float:
    """Stream traffic in units of C elements a token."""
    return traffic.evaluate(moved.streams, n_streams=n, width=width, tokens=tokens) / width


# arXiv 2512.24880, Table 2: elements read and written a token, C = 1 beside the coefficients' n² + 2n.
TABLE_2 = {
    "coefficients": (lambda n: n, lambda n: 0),
    "pre applied": (lambda n: n, lambda n: 1),
    "post applied": (lambda n: 1, lambda n: n),
    "res applied": (lambda n: n, lambda n: n),
    "merge": (lambda n: 2 * n, lambda n: n),
}


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_unfused_traffic_is_the_papers_table(n):
    reads = sum(read(n) for read, _ in TABLE_2.values())
    writes = sum(write(n) for _, write in TABLE_2.values())
    unfused = traffic.PER_SITE["inductor"].forward.least
    assert rows(unfused, n) == reads + writes == 8 * n + 2
    coefficients = traffic.evaluate(unfused.coefficients, n_streams=n)
    # Written once, and each read once where it is applied.
    assert coefficients == 2 * (n * n + 2 * n)


def test_traffic_of_a_site_at_four_streams():
    forward = {fusion: rows(passes.forward.least) for fusion, passes in traffic.PER_SITE.items()}
    assert forward == {"inductor": 34, "paper": 18, "site": 14, "boundary": 10}
    assert rows(traffic.PLAIN.forward.least) == rows(traffic.PLAIN.backward.least) == 3
    backward = {fusion: rows(passes.backward.least) for fusion, passes in traffic.PER_SITE.items()}
    assert backward == {"inductor": 59, "paper": 35, "site": 35, "boundary": 15}
    least = traffic.PER_SITE["boundary"].backward.least
    assert traffic.evaluate(least.phi, n_streams=4, width=WIDTH) == 2 * 24 * 4 * WIDTH


@pytest.mark.parametrize("tokens", [64, 1024, MANY])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_each_fusion_moves_less_than_the_one_before(n, tokens):
    values = {"n_streams": n, "width": WIDTH, "tokens": tokens, "element_size": 2, "sites": 64, "iters": 20}
    for amount in ("least", "ours"):
        totals = [
            traffic.evaluate(getattr(traffic.chain(fusion).forward, amount).bytes, **values)
            + traffic.evaluate(getattr(traffic.chain(fusion).backward, amount).bytes, **values)
            for fusion in traffic.PER_SITE
        ]
        assert totals == sorted(totals, reverse=True)
        assert len(set(totals)) == len(totals)


def test_a_chain_of_boundaries_has_one_end_of_each_kind():
    ends = traffic.OPERATORS["expand"] + traffic.OPERATORS["collapse"]
    for fusion in ("site", "boundary"):
        alone = traffic.chain(fusion).forward.least.streams.subs(traffic.SITES, 1)
        assert alone == (traffic.OPERATORS["pre"] + traffic.OPERATORS["post"] + ends).forward.least.streams
    grown = traffic.chain("boundary").forward.least.streams.subs(traffic.SITES, 3)
    one = traffic.chain("boundary").forward.least.streams.subs(traffic.SITES, 2)
    assert (grown - one).expand() == traffic.OPERATORS["post_pre"].forward.least.streams.expand()


def recorded(operator: str, n: int, tokens: int, width: int) -> tuple[list, list]:
    """Launches of the forward and of the backward: (kernel, tensors, options)."""
    found = []

    def record(kernel, grid, args, options):
        found.append((kernel.__name__, [arg for arg in args if isinstance(arg, torch.Tensor)], options))

    tensors, constants = inputs(operator, Problem(tokens, n, width, torch.bfloat16))
    grads = [grad.to("meta") for grad in many(reference_of(operator)(*tensors, *constants))]
    meta = [tensor.to("meta") for tensor in tensors]
    with recording(record):
        kernel_of(operator)(*meta, *constants)
        forward = len(found)
        kernel_of(f"{operator}_backward")(*grads, *meta, *constants)
    return found[:forward], found[forward:]


def stream_rows(launches: list, n: int, tokens: int, width: int) -> int:
    """Count what launches move of streams, in units of C a token: each tensor once, and what is known beyond."""
    total = 0
    for name, tensors, options in launches:
        loaded = {id(tensor): tensor.numel() for tensor in tensors if tensor.dtype == torch.bfloat16}
        total += sum(loaded.values()) // (tokens * width)
        if name in ("pre_forward_kernel", "post_pre_forward_kernel"):
            total += n  # the collapse walks over the streams again
        if name == "stream_gradients_kernel" and not options["STORE"]:
            total -= 1  # takes the gradient of the layer input and does not read it
        if name == "partial_projections_kernel" and options["ONE"]:
            # Each stream has a program of its own, which loads what all of them share.
            shared = (n + 1 if options["MIX"] else 0) + (1 if options["GRADS"] else 0)
            total += (n - 1) * shared
    return total


@pytest.mark.parametrize("operator", ["pre", "post", "post_pre", "head"])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_our_traffic_is_that_of_the_launches(operator, n):
    tokens, width = 96, 64
    forward, backward = recorded(operator, n, tokens, width)
    passes = traffic.OPERATORS[operator]
    assert rows(passes.forward.ours, n, tokens, width) == stream_rows(forward, n, tokens, width)
    assert rows(passes.backward.ours, n, tokens, width) == stream_rows(backward, n, tokens, width)


@pytest.mark.parametrize("operator", sorted(traffic.OPERATORS.keys() - {"expand", "collapse"}))
@pytest.mark.parametrize("n", [1, 4, 5, 8])
@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_launches_are_counted(operator, n, tokens):
    forward, backward = recorded(operator, n, tokens, 64)
    passes = traffic.OPERATORS[operator]
    assert traffic.evaluate(passes.forward.launches, n_streams=n, tokens=tokens) == len(forward)
    assert traffic.evaluate(passes.backward.launches, n_streams=n, tokens=tokens) == len(backward)


@pytest.mark.parametrize("n", [2, 4])
def test_partial_sums_are_counted(n):
    tokens, width = 96, 80
    _, backward = recorded("post_pre", n, tokens, width)
    shapes = {name: [tuple(tensor.shape) for tensor in tensors] for name, tensors, _ in backward}
    shares = math.ceil(width / 16)
    assert (shares, n * (n + 1), tokens) in shapes["mixing_gradients_kernel"]
    gates = 4 * (n * n + 2 * n + 1 + n)
    counted = traffic.OPERATORS["post_pre"].backward.ours.coefficients
    beyond = 2 * shares * n * (n + 1) + 3 * n * (n + 1) + gates
    assert traffic.evaluate(counted, n_streams=n, width=width, tokens=tokens) == beyond


def test_shares_of_the_tokens_are_those_of_the_launch():
    for n in (1, 4, 8):
        for tokens in (1, 33, 8192):
            for width in (64, 2560, 7168):
                blocks = n * -(-width // 32)
                assert traffic._SPLITS.subs(
                    {traffic.STREAMS: n, traffic.TOKENS: tokens, traffic.WIDTH: width}
                ) == token_splits(tokens, blocks, 32)


@pytest.mark.parametrize("n", [1, 4])
def test_the_papers_split_is_that_of_its_kernels(n):
    tokens, width = 96, 64
    launches = []

    def record(kernel, grid, args, options):
        launches.append((kernel.__name__, [arg for arg in args if isinstance(arg, torch.Tensor)], options))

    (streams, *mapping), constants = inputs("paper_pre", Problem(tokens, n, width, torch.bfloat16))
    (_, branch, *mixing), _ = inputs("post", Problem(tokens, n, width, torch.bfloat16))
    with recording(record):
        kernel_of("paper_pre")(*(tensor.to("meta") for tensor in (streams, *mapping)), *constants)
        kernel_of("post")(*(tensor.to("meta") for tensor in (streams, branch, *mixing)))
    forward = traffic.PER_SITE["paper"].forward
    assert rows(forward.ours, n, tokens, width) == stream_rows(launches, n, tokens, width) == 4 * n + 2
    assert traffic.evaluate(forward.launches) == len(launches)


def test_few_tokens_find_the_streams_in_the_cache():
    assert rows(traffic.OPERATORS["post_pre"].forward.ours, tokens=64) == 10
    assert rows(traffic.OPERATORS["post_pre"].forward.ours, tokens=65) == 14
    assert rows(traffic.OPERATORS["post_pre"].backward.ours, tokens=65) == 26


def test_no_kernel_moves_less_than_the_least():
    for n in range(1, 9):
        for tokens in (1, 100):
            values = {"n_streams": n, "width": 64, "tokens": tokens, "element_size": 2, "iters": 20}
            for passes in traffic.OPERATORS.values():
                for one in (passes.forward, passes.backward):
                    assert traffic.evaluate(one.ours.bytes, **values) >= traffic.evaluate(one.least.bytes, **values)


@pytest.mark.parametrize("operator", ["pre", "post", "post_pre", "head"])
def test_flops_of_the_matrix_products_are_those_of_the_reference(operator):
    from torch.utils.flop_counter import FlopCounterMode

    n, tokens, width = 4, 8, 512
    tensors, constants = inputs(operator, Problem(tokens, n, width))
    with FlopCounterMode(display=False) as counter:
        reference_of(operator)(*tensors, *constants)
    ours = traffic.evaluate(traffic.OPERATORS[operator].forward.flops, n_streams=n, width=width, iters=0) * tokens
    # Beyond the products: the norm, and the branch's share of `post`, which is no matrix product there.
    beyond = {"pre": 2 * n * width, "post": 2 * n * width, "post_pre": 4 * n * width, "head": 2 * n * width}
    exp = n * n if operator in ("pre", "post_pre") else 0
    assert ours == counter.get_total_flops() + (beyond[operator] + exp) * tokens


def test_a_missing_number_is_named():
    with pytest.raises(ValueError, match="depends on width"):
        traffic.evaluate(traffic.OPERATORS["post"].forward.least.streams, n_streams=4)


@pytest.mark.parametrize(("sites", "n"), [(1, 4), (2, 1), (60, 4), (64, 4), (64, 8), (200, 2)])
def test_interval_is_the_minimum_near_the_root(sites, n):
    chosen = traffic.recompute_interval(sites, n)
    held = [n * math.ceil(sites / interval) + (n + 2) * interval for interval in range(1, sites + 1)]
    assert held[chosen - 1] == min(held)
    assert min(held) not in held[: chosen - 1]
    assert abs(chosen - math.sqrt(n * sites / (n + 2))) <= 2


def test_interval_needs_a_site():
    with pytest.raises(ValueError, match="at least one"):
        traffic.recompute_interval(0, 4)


def test_recomputation_holds_what_the_paper_counts():
    # L = 60, n = 4: 10 stored streams, 60 branch outputs and 6 sites of 6C alive, against 60 sites of (n + 3)C,
    # two of which (the layer input and its norm) its branches keep.
    assert traffic.recompute_interval(60, 4) == 6
    values = {"sites": 60, "n_streams": 4, "width": 1, "interval": 6}
    assert traffic.evaluate(traffic.held_elements(recomputed=True), **values) == 136
    assert traffic.evaluate(traffic.held_elements(recomputed=False), **values) + 2 * 60 == 420
    assert traffic.saved_bytes_per_token(60, 4, 100, 2, 6) == 136 * 100 * 2 + 6 * 20 * 4
    assert traffic.saved_bytes_per_token(60, 4, 100, 2) == 300 * 100 * 2 + 60 * 20 * 4
