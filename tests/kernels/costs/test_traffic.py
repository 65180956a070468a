"""The cost model: the paper's table, what the kernels really launch, and what is saved for the backward."""

from __future__ import annotations

import math

import pytest
import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.dispatch import reference_of
from mhc_compile.kernels.manifolds import MANIFOLDS

from benchmarks import traffic as counter
from benchmarks.problems import Shape
from tests.kernels.problems import NORMED, OPERATORS, Problem, inputs, launches

WIDTH = 4096
MANY = 8192


def rows(moved: traffic.Traffic, n: int = 4, tokens: int = MANY, width: int = WIDTH) -> float:
    """Stream traffic in units of C elements a token."""
    return traffic.evaluate(moved.streams, n_streams=n, width=width, tokens=tokens, element_size=2) / width


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

    def total(fusion, amount):
        passes = traffic.chain(fusion)
        return sum(traffic.evaluate(getattr(one, amount).bytes, **values) for one in (passes.forward, passes.backward))

    least = [total(fusion, "least") for fusion in traffic.PER_SITE]
    assert least == sorted(least, reverse=True)
    assert len(set(least)) == len(least)
    # As they are, site and paper run the same kernels but for the coefficients; joined, boundaries move the fewest.
    ours = {fusion: total(fusion, "ours") for fusion in traffic.PER_SITE}
    assert min(ours, key=ours.__getitem__) == "boundary"
    assert ours["site"] < ours["paper"]


def test_a_chain_of_boundaries_has_one_end_of_each_kind():
    ends = traffic.OPERATORS["expand"] + traffic.OPERATORS["mean"]
    for fusion in ("site", "boundary"):
        alone = traffic.chain(fusion).forward.least.streams.subs(traffic.SITES, 1)
        assert alone == (traffic.OPERATORS["pre"] + traffic.OPERATORS["post"] + ends).forward.least.streams
    grown = traffic.chain("boundary").forward.least.streams.subs(traffic.SITES, 3)
    one = traffic.chain("boundary").forward.least.streams.subs(traffic.SITES, 2)
    assert (grown - one).expand() == traffic.OPERATORS["post_pre"].forward.least.streams.expand()


# Small, but with several splits of C and of the tokens; phi as it is and prepared; a `post` first and not.
@pytest.mark.parametrize(("operator", "tokens", "width", "n", "anchored"), [
    ("post_pre", 40, 96, 4, True), ("post_pre", 150, 64, 2, False), ("pre", 130, 96, 4, True),
    ("head", 20, 40, 3, True), ("post_measure", 20, 96, 4, True), ("collapse", 20, 96, 4, True),
    ("post", 20, 96, 4, True), ("pre", 20, 64, 6, True), ("pre", 20, 64, 6, False),
    ("post_pre_norm", 40, 96, 4, True), ("collapse_norm", 130, 64, 2, True),
])  # fmt: skip
def test_our_traffic_is_what_the_kernels_move(operator, tokens, width, n, anchored):
    """Bytes counted in the interpreter at the launches of a device."""
    shape = Shape(operator, tokens, n, width, torch.bfloat16, anchored)
    for backward, counted in enumerate(counter.count(shape)):
        assert counted or operator == "post_measure"
        assert counter.disagreement(shape, counted, bool(backward)) <= counter.TOLERANCE


# Rows of phi and of the slopes are most of what few tokens move: an identity has 8 of them, a permutation 32.
@pytest.mark.parametrize("manifold", ["identity", "kronecker", "row", "permutation"])
@pytest.mark.parametrize("operator", ["post_pre", "pre_norm"])
def test_traffic_is_counted_by_manifold(operator, manifold):
    shape = Shape(operator, 40, 4, 64, torch.bfloat16, True, manifold)
    for backward, counted in enumerate(counter.count(shape)):
        assert counted
        assert counter.disagreement(shape, counted, bool(backward)) <= counter.TOLERANCE


def test_a_manifold_costs_what_its_logits_do():
    values = {"n_streams": 4, "width": WIDTH, "tokens": MANY, "element_size": 2, "iters": 20, "sites": 8}
    for passes in (traffic.OPERATORS["pre"], traffic.PER_SITE["paper"], traffic.chain("boundary")):
        for one in (passes.forward, passes.backward):
            flops, moved = (
                {name: traffic.evaluate(amount, name, **values) for name in MANIFOLDS}
                for amount in (one.flops, one.ours.bytes)
            )
            assert flops["identity"] < flops["kronecker"] < flops["row"] < flops["sinkhorn"] < flops["permutation"]
            assert moved["identity"] < moved["kronecker"] < moved["row"] <= moved["sinkhorn"] < moved["permutation"]
    kept = {name: traffic.saved_bytes_per_token(1, 4, 100, 2, manifold=name) for name in MANIFOLDS}
    # Floats of the projection: 2n gates, the matrix's logits, and the sum of squares.
    streams = 5 * 100 * 2 + 20 * 4
    assert {name: (size - streams) / 4 for name, size in kept.items()} == {
        "sinkhorn": 25, "none": 25, "row": 25, "identity": 9, "kronecker": 11, "permutation": 33,
    }  # fmt: skip


def test_a_norm_within_saves_what_it_moves():
    """2C elements a token in the forward, 3C in the backward, against a kernel of its own."""
    for whole, normed in (("pre", "pre_norm"), ("post_pre", "post_pre_norm")):
        alone, within = traffic.OPERATORS[whole] + traffic.NORM, traffic.OPERATORS[normed]
        assert rows(alone.forward.ours) - rows(within.forward.ours) == 2
        assert rows(alone.backward.ours) - rows(within.backward.ours) == 3


def test_a_chain_saves_the_norms_that_are_folded_in():
    saved = [
        rows(traffic.chain("boundary", normed).forward.ours + traffic.chain("boundary").forward.ours * -1)
        for normed in (1, 3)
    ]
    assert saved == [-2, -6]
    assert traffic.site("site", normed=True) == traffic.PER_SITE["site"]


def test_a_replay_is_one_pass_and_the_backward_three():
    assert rows(traffic.OPERATORS["post_collapse"].forward.ours) == 10
    assert rows(traffic.OPERATORS["post_pre"].forward.ours) == 14
    # Gates 6C, streams 14C, `post` 14C.
    assert rows(traffic.OPERATORS["post_pre"].backward.ours) == 34
    values = {"n_streams": 4, "width": WIDTH, "tokens": MANY, "element_size": 2, "iters": 20}
    unit = MANY * WIDTH * 2
    replay = traffic.evaluate(traffic.OPERATORS["post_collapse"].forward.ours.bytes, **values)
    forward = traffic.evaluate(traffic.OPERATORS["post_pre"].forward.ours.bytes, **values)
    assert replay <= 10.1 * unit
    assert forward <= 14.25 * unit


@pytest.mark.parametrize("fusion", ["site", "boundary"])
def test_a_site_that_is_replayed_costs_its_second_half_again(fusion):
    replayed = traffic.REPLAYED[fusion]
    assert rows(replayed.least) == {"site": 9 + 5, "boundary": 10}[fusion]
    # In halves the forward of a boundary reads no streams back, but reads and mixes them twice.
    assert rows(replayed.ours) == {"site": 9 + 5, "boundary": 10 + 1}[fusion]


@pytest.mark.parametrize("operator", [*OPERATORS, *NORMED])
@pytest.mark.parametrize("n", [1, 4, 5, 8])
@pytest.mark.parametrize("tokens", [1, 64, 150])
def test_launches_are_counted(operator, n, tokens):
    forward, backward = launches(operator, Problem(tokens, n, 64, torch.bfloat16))
    sizes = {"n_streams": n, "tokens": tokens, "width": 64, "element_size": 2}
    if operator == "paper_pre":
        assert traffic.evaluate(traffic.PER_SITE["paper"].forward.launches, **sizes) == len(forward) + 1
        return
    passes = traffic.OPERATORS[operator]
    assert traffic.evaluate(passes.forward.launches, **sizes) == len(forward)
    assert traffic.evaluate(passes.backward.launches, **sizes) == len(backward)


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
    assert traffic.saved_bytes_per_token(60, 4, 100, 2, 6) == 136 * 100 * 2 + 60 * 45 * 4
    assert traffic.saved_bytes_per_token(60, 4, 100, 2) == 300 * 100 * 2 + 60 * 45 * 4
