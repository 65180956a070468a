"""Gradients of streams and phi: all streams of a block of C in one program, which walks over a share of the tokens.

Each tile of the streams is read once, and serves its own gradient and phi's, whose sums stay in registers. Behind a
`post` the streams are made again and never read, and the gradient that comes to them from elsewhere is added.
"""

# mypy: disable-error-code="assignment,misc,index,var-annotated"
# ruff: noqa: N803, RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coefficient_gradients import CoefficientGradients
from .configurations import Geometry, ceil_div, stream_gradients_config
from .launch import empty, launch, product_options, warps_for
from .norm_gates import Norm
from .phi import load_phi
from .primitives import materialize, piece_product, product, rounded, total
from .stream_tiles import load_streams, mix_stream


@triton.jit
def load_slopes(
    slopes: tl.tensor, token: tl.tensor, live: tl.tensor, slot: tl.tensor, tokens: tl.tensor, SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
) -> tuple:  # fmt: skip
    """Load PIECES tiles [tokens, SLOTS] of the gradient of the products with phi."""
    place = slopes + token[:, None] * SLOTS + slot[None, :]
    pieces = (tl.load(place, mask=live[:, None], other=0.0),)
    if PIECES == 2:
        pieces = pieces + (tl.load(place + tokens.to(tl.int64) * SLOTS, mask=live[:, None], other=0.0),)
    return pieces


@triton.jit(do_not_specialize=["tokens", "span"])
def stream_gradients_kernel(
    streams: tl.tensor,
    branch: tl.tensor,
    post: tl.tensor,
    res: tl.tensor,
    grad_fresh: tl.tensor,
    grad_input: tl.tensor,
    phi: tl.tensor,
    slopes: tl.tensor,
    factors: tl.tensor,
    norm_weight: tl.tensor,
    statistics: tl.tensor,
    grad_streams: tl.tensor,
    phi_parts: tl.tensor,
    norm_parts: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    span: tl.tensor,
    n: tl.constexpr,
    ROWS: tl.constexpr,
    ANCHORED: tl.constexpr,
    SLOTS: tl.constexpr,
    PIECES: tl.constexpr,
    NORM: tl.constexpr,
    CENTERED: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MIX: tl.constexpr,
    FIRST: tl.constexpr,
    END: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Write the gradient of streams FIRST … END - 1, and a share of phi's in terms of the streams as stored.

    With ANCHORED a difference's gradient is its stream's, and that of stream 0 the sum of all streams'. With NORM the
    gradient that comes in is that of the normed layer input, which is made again, and the first launch writes that of
    the norm's weight and bias, too.
    """
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (column < width)[None, :]
    slot = tl.arange(0, SLOTS)
    grad_phi = ()
    held = ()
    for o in tl.static_range(FIRST, END):
        grad_phi = grad_phi + (tl.full([SLOTS, BLOCK_WIDTH], 0.0, tl.float32),)
        factors_of_stream = load_phi(
            phi, slot[:, None], column[None, :], o, width, n, ROWS, ANCHORED, False, PIECES, COLUMNS, TRANSPOSED
        )
        held = held + (factors_of_stream,)
    if NORM:
        gain = tl.load(norm_weight + column, mask=column < width, other=0.0).to(tl.float32)
        grad_gain = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
        grad_shift = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
    first = tl.program_id(1) * span
    for start in range(first, tl.minimum(first + span, tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS)
        live = token < tokens
        token = token.to(tl.int64)
        mask = live[:, None] & inside
        base = token * width
        tiles = load_streams(streams, base, column, mask, n, width)
        grad = tl.load(grad_input + base[:, None] + column[None, :], mask=mask, other=0.0)
        if MIX:
            written = tl.load(branch + base[:, None] + column[None, :], mask=mask, other=0.0)
            fresh = ()
            for o in tl.static_range(n):
                if NORM or (o >= FIRST and o < END) or (ANCHORED and (o == 0 or FIRST == 0)):
                    fresh = fresh + (mix_stream(tiles, written, post, res, token, live, o, n, PRECISION),)
                else:
                    fresh = fresh + (tiles[o],)
            tiles = fresh
        if NORM:
            grad = grad.to(tl.float32)
            normed = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
            for i in tl.static_range(n):
                weight = tl.load(factors + tokens.to(tl.int64) * i + token, mask=live, other=0.0)
                normed += weight[:, None] * tiles[i].to(tl.float32)
            inverse_rms = tl.load(statistics + 2 * token + 1, mask=live, other=0.0)
            along = tl.load(factors + tokens.to(tl.int64) * (n + 1) + token, mask=live, other=0.0)
            if CENTERED:
                normed -= tl.load(statistics + 2 * token, mask=live, other=0.0)[:, None]
            normed = normed * inverse_rms[:, None]
            if FIRST == 0:
                grad_gain += grad * normed
                if CENTERED:
                    grad_shift += grad
            grad = grad * gain[None, :] - along[:, None] * normed
            if CENTERED:
                grad -= tl.load(factors + tokens.to(tl.int64) * (n + 2) + token, mask=live, other=0.0)[:, None]
            grad = grad * inverse_rms[:, None]
        pieces = load_slopes(slopes, token, live, slot, tokens, SLOTS, PIECES)
        pull = tl.load(factors + tokens.to(tl.int64) * n + token, mask=live, other=0.0)
        grown = ()
        for o in tl.static_range(FIRST, END):
            through = tiles[o].to(tl.float32)
            if ANCHORED:
                if o == 0:
                    through = n * through
                    for other in tl.static_range(1, n):
                        through += tiles[other].to(tl.float32)
                else:
                    through += tiles[0].to(tl.float32)
            weight = tl.load(factors + tokens.to(tl.int64) * o + token, mask=live, other=0.0)
            direct = weight[:, None] * grad.to(tl.float32) + pull[:, None] * through
            place = base[:, None] * n + o * width + column[None, :]
            if MIX:
                direct += tl.load(grad_fresh + place, mask=mask, other=0.0).to(tl.float32)
            zero = tl.full([BLOCK_TOKENS, BLOCK_WIDTH], 0.0, tl.float32)
            direct += materialize(piece_product(pieces, held[o - FIRST], zero, PRECISION), PRECISION)
            tl.store(grad_streams + place, rounded(direct, grad_streams.dtype.element_ty), mask=mask)
            share = grad_phi[o - FIRST]
            if PIECES == 2:
                share = product(tl.trans(pieces[1]), tiles[o], share, PRECISION)
                share = product(tl.trans(pieces[0]), tiles[o], share, PRECISION)
            else:
                share = product(tl.trans(pieces[0]), tiles[o].to(tl.float32), share, PRECISION)
            grown = grown + (share,)
        grad_phi = grown
    place = phi_parts + (tl.program_id(1).to(tl.int64) * ROWS + slot[:, None]) * (n * width) + column[None, :]
    for o in tl.static_range(FIRST, END):
        tl.store(place + o * width, grad_phi[o - FIRST], mask=(slot < ROWS)[:, None] & inside)
    if NORM and FIRST == 0:
        place = norm_parts + tl.program_id(1).to(tl.int64) * (2 * width) + column
        tl.store(place, total(grad_gain, 0), mask=column < width)
        if CENTERED:
            tl.store(place + width, total(grad_shift, 0), mask=column < width)


def stream_gradients(
    streams: Tensor,
    phi: Tensor,
    grad_input: Tensor,
    found: CoefficientGradients,
    geometry: Geometry,
    *,
    mixing: tuple[Tensor, Tensor, Tensor] | None = None,
    grad_fresh: Tensor | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of the streams and partial gradients of phi, and of the norm's weight and bias.

    Args:
        streams: contiguous [tokens, n, C].
        phi: [rows, n·C], as the geometry's layout says.
        grad_input: [tokens, C] gradient of the collapsed streams, of their norm where there is one.
        found: the gradients of the site's coefficients.
        geometry: of the call.
        mixing: (branch [tokens, C], post [tokens, n], res [tokens, n, n]) of a `post` that comes first: the streams
            are then those after it, made again in registers.
        grad_fresh: [tokens, n, C], with `mixing` the gradient of these streams from elsewhere, which theirs is added
            to.
        norm: of the layer input, if it has one.

    Returns:
        [tokens, n, C] gradient in the streams' dtype; partial gradients in float32, [splits, rows, n·C] of phi and
        [splits, 2, C] of the norm's weight and bias (without a norm, phi's again).
    """
    config = stream_gradients_config(geometry, norm is not None)
    span = ceil_div(ceil_div(geometry.tokens, config.splits), config.block_tokens) * config.block_tokens
    splits = ceil_div(geometry.tokens, span)
    grad_streams = torch.empty_like(streams)
    phi_parts = empty(streams, splits, geometry.rows, geometry.n * geometry.width)
    norm_parts = empty(streams, splits, 2, geometry.width) if norm else phi_parts
    nothing = (found.factors, found.factors)
    for first in range(0, geometry.n, config.streams):
        launch(
            stream_gradients_kernel, (ceil_div(geometry.width, config.block_width), splits),
            streams, *(mixing or (streams, *nothing)),
            streams if grad_fresh is None else grad_fresh, grad_input, phi, found.slopes, found.factors,
            *((norm.weight, norm.statistics) if norm else nothing), grad_streams, phi_parts,
            norm_parts, geometry.tokens, geometry.width, span,
            SLOTS=geometry.slots, PIECES=geometry.pieces,
            NORM=norm is not None, CENTERED=norm is not None and norm.centered, MIX=mixing is not None,
            FIRST=first, END=min(first + config.streams, geometry.n),
            BLOCK_TOKENS=config.block_tokens, BLOCK_WIDTH=config.block_width,
            num_stages=1, **warps_for(config.warps), **geometry.constants(), **geometry.phi(), **product_options(),
        )  # fmt: skip
    return grad_streams, phi_parts, norm_parts
