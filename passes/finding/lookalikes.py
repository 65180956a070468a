"""What has the dataflow of a residual add and yet must stay alone.

Streams that the model carries itself, attention scores with a bias that earlier layers read too, skips across
resolutions, the coupling of two streams. Each rule reads the reach from the skip to the branch.
"""

from __future__ import annotations

import math

from torch.fx import Node

from ..fx.dataflow import PRODUCT_NAMES, Reach, behind_views, is_add, op_name, operands, shape_of, tensor_of
from ..residual import Reason
from .operand_kinds import Kind
from .other_adds import Causes

_UPSAMPLING = {"interpolate", "upsample", "pixel_shuffle", "repeat_interleave", "max_unpool2d"}
_UPSAMPLING_MARKS = ("upsample", "conv_transpose")
_REPEATS = {"repeat", "expand", "expand_as"}
_MATRIX_PRODUCTS = {"matmul", "bmm", "einsum"}
# More streams than this nobody carries; a square of this size per token is a mixing matrix.
_MOST_STREAMS = 16


def veto(
    add: Node,
    fork: Node,
    branch: Node,
    reach: dict[Node, Reach],
    causes: Causes,
    independent: set[Node],
    tables: set[Node],
) -> Reason | None:
    """Return why an add with the dataflow of a residual is none, or None.

    Args:
        add: the add.
        fork: the value that the branch reads.
        branch: the operand that is not the skip.
        reach: how each node behind `fork` reaches `branch`.
        causes: the graph's causes.
        independent: the adds met so far whose operands are independent of each other.
        tables: the adds met so far that add an embedding.
    """
    if mixes_streams(fork, branch, causes):
        return Reason.NATIVE_STREAMS
    if causes.goes_to_softmax(add):
        return Reason.ATTENTION_SCORES
    if causes.kinds[fork] is not Kind.ACTIVATION and _crosses(fork, branch, tables & reach.keys(), causes):
        return Reason.EMBEDDING
    if _crosses(fork, branch, {node for node in reach if _is_upsampling(node)}, causes):
        return Reason.RESOLUTIONS
    for other in independent & reach.keys():
        if _couples(other, add, fork, branch, reach, causes):
            return Reason.REVERSIBLE
    return None


def writes_streams(write: Node, rest: Node, causes: Causes) -> bool:
    """Return whether one operand of an add writes a value into several streams, each with a coefficient of its own.

    The write is a product of one coefficient per token and stream, [*, n, 1], with a value that is the same for all
    streams, [*, 1, C] or repeated. The value must come from the streams over learned weights: the outer product that
    a linear attention writes into its state does not.
    """
    product = behind_views(write)
    if op_name(product) in _MATRIX_PRODUCTS:
        factors = [source for source in product.all_input_nodes if causes.kinds[source] is Kind.ACTIVATION]
        if len(factors) != 2:
            return False
        pairs = ((left, right) for left, right in (factors, factors[::-1]) if _is_outer(product, left, right))
    elif op_name(product) in PRODUCT_NAMES:
        left, right = operands(product)
        pairs = (
            (coefficient, value)
            for coefficient, value in ((left, right), (right, left))
            if _is_stream_coefficient(coefficient, causes) and _is_repeated(value, coefficient)
        )
    else:
        return False
    return any(_comes_from(value, _streams_behind(rest), causes) for _, value in pairs)


def _is_outer(product: Node, coefficient: Node, value: Node) -> bool:
    """Return whether a product has, for each token, all products of a few coefficients and a value's features."""
    entries, few, features = (math.prod(shape_of(node)) for node in (product, coefficient, value))
    width = shape_of(value)[-1] if shape_of(value) else 0
    return few * width == entries and any(features * n == entries for n in range(2, _MOST_STREAMS + 1))


def _is_stream_coefficient(node: object, causes: Causes) -> bool:
    if not isinstance(node, Node) or causes.kinds[node] is not Kind.ACTIVATION:
        return False
    sizes = shape_of(node)
    return (
        len(sizes) > 2 and sizes[-1] == 1 and any(isinstance(size, int) and 1 < size <= _MOST_STREAMS for size in sizes)
    )


def _is_stream_count(size: object) -> bool:
    return isinstance(size, int) and 1 < size <= _MOST_STREAMS


def _is_repeated(value: object, coefficient: Node) -> bool:
    """Return whether a value is one for all streams: of size 1 where the coefficient has one entry a stream."""
    if not isinstance(value, Node):
        return False
    if op_name(value) in _REPEATS:
        return True
    sizes, wanted = shape_of(value), shape_of(coefficient)
    if len(sizes) != len(wanted):
        return False
    return any(size == 1 and _is_stream_count(streams) for size, streams in zip(sizes[:-1], wanted[:-1], strict=True))


def _streams_behind(rest: Node) -> set[Node]:
    """Return what may be the streams: the other operand itself, or what a matrix mixes into it."""
    behind = behind_views(rest, "getitem", "select", "narrow")
    sources = (
        {behind_views(source) for source in behind.all_input_nodes} if op_name(behind) in _MATRIX_PRODUCTS else set()
    )
    return {behind, *sources}


def _comes_from(value: Node, streams: set[Node], causes: Causes) -> bool:
    """Return whether a value is computed from one of the streams over learned weights."""
    order = causes.order
    floor = min(order[stream] for stream in streams)
    seen, stack, learned = {value}, [value], False
    reached = False
    while stack:
        node = stack.pop()
        reached |= node in streams
        learned |= node in causes.mixing and any(
            causes.kinds[source] is Kind.FIXED for source in node.all_input_nodes if tensor_of(source) is not None
        )
        for source in node.all_input_nodes:
            if source not in seen and order[source] >= floor:
                seen.add(source)
                stack.append(source)
    return reached and learned


def mixes_streams(fork: Node, branch: Node, causes: Causes) -> bool:
    """Return whether a branch is its skip times a small square matrix per token, as in alternating updates."""
    product = behind_views(branch)
    if op_name(product) not in _MATRIX_PRODUCTS:
        return False
    inputs = product.all_input_nodes
    squares = [node for node in inputs if _is_square_per_token(node, causes)]
    return bool(squares) and any(behind_views(node) is behind_views(fork) for node in inputs)


def _is_square_per_token(node: Node, causes: Causes) -> bool:
    sizes = shape_of(node)
    return (
        len(sizes) > 3
        and sizes[-1] == sizes[-2]
        and isinstance(sizes[-1], int)
        and sizes[-1] <= _MOST_STREAMS
        and causes.kinds[node] is Kind.ACTIVATION
    )


def _crosses(fork: Node, branch: Node, gates: set[Node], causes: Causes) -> bool:
    """Return whether every way back from `branch` to `fork` passes one of `gates`."""
    if not gates:
        return False
    seen, stack = {branch}, [branch]
    while stack:
        node = stack.pop()
        if node is fork:
            return False
        if node in gates:
            continue
        for source in node.all_input_nodes:
            if source not in seen and causes.order[source] >= causes.order[fork]:
                seen.add(source)
                stack.append(source)
    return True


def _is_upsampling(node: Node) -> bool:
    name = op_name(node)
    return name in _UPSAMPLING or any(mark in name for mark in _UPSAMPLING_MARKS)


def _couples(other: Node, add: Node, fork: Node, branch: Node, reach: dict[Node, Reach], causes: Causes) -> bool:
    """Return whether the branch reads the fork only through another stream: `other` = that stream + mixed fork.

    The other stream lives on: its sum is read outside the branch too. A sum inside a branch is not.
    """
    if (
        not is_add(other)
        or shape_of(other) != shape_of(add)
        or all(user in reach or user is add for user in other.users)
    ):
        return False
    left, right = operands(other)
    for stream, mixed in ((left, right), (right, left)):
        # A table added to the branch's input is no stream.
        if causes.kinds[stream] is Kind.ACTIVATION and reach.get(mixed, Reach(0)) & Reach.MIXED:
            return causes.order[stream] < causes.order[mixed] and _crosses(fork, branch, {other}, causes)
    return False
