"""The operators in plain PyTorch: the definition, the CPU path and the test oracle.

Notation of arXiv 2512.24880, section 4. One token has streams X [n, C]. A site has `phi` [rows, n·C], `scale` and
`bias`, rows ordered pre (n) | post (n) | res (n·n, row-major, `res[out, in]`). `*` is any leading shape.

Everything accumulates in float32, or in float64 when the streams are float64. The forward functions can be
differentiated by autograd, which is how the hand-written backward functions beside them are tested.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import anchored as anchoring
from .epsilons import eps_of_site
from .manifolds import MANIFOLDS, Manifold, sinkhorn_project, sinkhorn_project_backward
from .orientation import in_columns, in_kernel_rows

NORM_EPS = 1e-6


class PreOutput(NamedTuple):
    """What `functional.pre` returns: layer_input [*, C], post [*, n], res [*, n, n]."""

    layer_input: Tensor
    post: Tensor
    res: Tensor


class SiteOutput(NamedTuple):
    """What `pre` returns: layer_input [*, C], post [*, n], res [*, n, n], and the projection [*, rows + 1].

    The projection is what the backward reads in place of projecting again: the products phi · vec(X), before 1/RMS, and
    behind them the sum of squares of the streams.
    """

    layer_input: Tensor
    post: Tensor
    res: Tensor
    projection: Tensor


class _Logits(NamedTuple):
    """A token's affine logits [*, rows], the products [*, rows] and 1/RMS [*, 1] that they come from."""

    logits: Tensor
    products: Tensor
    inverse_rms: Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that coefficients and sums are held in: float64 for float64 streams, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def sinkhorn(logits: Tensor, iters: int = 20, eps: float = 0.0) -> Tensor:
    """Project [*, n, n] logits onto the doubly stochastic matrices; rows (dim -1) sum to 1 (Eq. 9)."""
    return sinkhorn_project(logits.to(accumulation_dtype(logits)), iters, eps).to(logits.dtype)


def sinkhorn_backward(grad_res: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Return the gradient of `sinkhorn` with respect to its logits."""
    dtype = accumulation_dtype(logits)
    return sinkhorn_project_backward(grad_res.to(dtype), logits.to(dtype), iters, eps).to(logits.dtype)


def pre(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    iters: int = 20,
    norm_eps: float = NORM_EPS,
    eps: float = 0.0,
    manifold: str = "sinkhorn",
    anchored: bool = False,
    transposed: bool = False,
    sinkhorn_eps: Sequence[float] = (),
) -> SiteOutput:
    """Compute a site's coefficients and collapse its streams into the branch's input (Eq. 5, 7, 8).

    Args:
        streams: [*, n, C], any floating dtype.
        phi: [rows, n·C] projection.
        scale: [3] (pre, post, res), or [2] for a manifold that does not mix.
        bias: [rows].
        iters: Sinkhorn iterations.
        norm_eps: added to the mean square before the root; keeps all-zero tokens finite.
        eps: added to pre, and inside Sinkhorn; 0 keeps the sums exact, DeepSeek-V4 uses 1e-6.
        manifold: a name of `MANIFOLDS`.
        anchored: the streams are anchored (see `anchored`), and so are the post and res that are returned.
        transposed: the n·n last rows of phi and bias are ordered [in, out], as DeepSeek-V4 stores them; the res that is
            returned is `res[out, in]` all the same, and the projection is in that order too.
        sinkhorn_eps: added to Sinkhorn's first sums, to the matrix behind them, and to later sums (see `epsilons`);
            empty, `eps` is where DeepSeek-V4 has it.

    Returns:
        layer_input [*, C] in the streams' dtype; post [*, n], res [*, n, n] and the projection [*, rows + 1], which is
        not differentiable, in the accumulation dtype.
    """
    projection = torch.cat(products(streams, phi, manifold, anchored, transposed), dim=-1)
    site = pre_of(streams, scale, bias, projection, iters, norm_eps, eps, manifold, anchored, transposed, sinkhorn_eps)
    return SiteOutput(*site, projection.detach())


def products(
    streams: Tensor, phi: Tensor, manifold: str, anchored: bool = False, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the two parts of a projection: phi · vec(X) [*, rows] and the sum of squares [*, 1]; see `pre`."""
    n = streams.shape[-2]
    found, squares = _products(streams, phi, anchored)
    return in_kernel_rows(found, MANIFOLDS[manifold], n, transposed), squares


def pre_of(
    streams: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
    transposed: bool = False,
    sinkhorn_eps: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `pre`'s layer_input, post and res, given its projection."""
    family, n = MANIFOLDS[manifold], streams.shape[-2]
    bias = in_kernel_rows(bias, family, n, transposed)
    logits = _logits(projection, scale, bias, n * streams.shape[-1], norm_eps, _groups(family, n)).logits
    pre_logits, post_logits, res_logits = _split(logits, family, n)
    weights = torch.sigmoid(pre_logits) + eps if family.gated else pre_logits
    post_weights = 2.0 * torch.sigmoid(post_logits) if family.gated else post_logits
    within = eps_of_site(eps, sinkhorn_eps, manifold)
    res = family.project(res_logits, iters, within)
    if anchored:
        weights, post_weights = anchoring.read_weights(weights), anchoring.write_weights(post_weights)
        res = anchoring.mixing(res, family.rows_are_exact(within))
    return _weighted_sum(streams, weights), post_weights.contiguous(), res


def measure(
    streams: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *constants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pre` returns beside the layer input: post, res and the projection. Not differentiated."""
    return pre(streams, phi, scale, bias, *constants)[1:]


def collapse(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    post: Tensor,
    res: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `pre` returns, given what `measure` did: the layer input, and copies of post and res.

    Together they are `pre`, whose backward is this one's. Run again in a backward, this reads the streams once and
    needs neither phi nor the manifold.
    """
    family, n = MANIFOLDS[manifold], streams.shape[-2]
    gates = torch.cat([projection[..., :n], projection[..., -1:]], dim=-1)
    logits = _logits(gates, scale[:1], bias[:n], n * streams.shape[-1], norm_eps, (n,)).logits
    weights = torch.sigmoid(logits) + eps if family.gated else logits
    weights = anchoring.read_weights(weights) if anchored else weights
    return _weighted_sum(streams, weights), post.clone(), res.clone()


def pre_backward(
    grad_layer_input: Tensor,
    grad_post: Tensor,
    grad_res: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    iters: int,
    norm_eps: float,
    eps: float,
    manifold: str,
    anchored: bool = False,
    transposed: bool = False,
    sinkhorn_eps: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Return the gradients of `pre` with respect to streams, phi, scale and bias, given its projection."""
    family = MANIFOLDS[manifold]
    dtype = accumulation_dtype(streams)
    n = streams.shape[-2]
    within = eps_of_site(eps, sinkhorn_eps, manifold)
    groups = _groups(family, n)
    wide = anchoring.release(_wide(streams)) if anchored else _wide(streams)
    ordered = functools.partial(in_kernel_rows, family=family, n=n, transposed=transposed)
    logits = _logits(projection, scale, ordered(bias), n * streams.shape[-1], norm_eps, groups)
    pre_logits, post_logits, res_logits = _split(logits.logits, family, n)

    grad_input = grad_layer_input.to(dtype)
    grad_pre = (wide @ grad_input.unsqueeze(-1)).squeeze(-1)
    grad_post, grad_res = grad_post.to(dtype), grad_res.to(dtype)
    if anchored:
        grad_post = anchoring.write_weights_backward(grad_post)
        grad_res = anchoring.mixing_backward(grad_res, family.rows_are_exact(within))
    if family.gated:
        pre_gate, post_gate = torch.sigmoid(pre_logits), torch.sigmoid(post_logits)
        weights = pre_gate + eps
        grad_pre = grad_pre * pre_gate * (1.0 - pre_gate)
        grad_post = grad_post * 2.0 * post_gate * (1.0 - post_gate)
    else:
        weights = pre_logits
    grad_logits = [grad_pre, grad_post]
    if family.mixes:
        grad_mixing = family.project_backward(grad_res, res_logits, iters, within)
        grad_logits.append(grad_mixing.flatten(-2) if family.logits is None else grad_mixing)
    grad_streams, *grads = _project_by_phi_backward(
        torch.cat(grad_logits, dim=-1), wide, logits, phi, scale, groups, ordered
    )
    if anchored:
        grad_streams, weights = anchoring.release_backward(grad_streams), anchoring.read_weights(weights)
    grad_streams = grad_streams + weights.unsqueeze(-1) * grad_input.unsqueeze(-2)
    return _in_dtypes((grad_streams, *grads), (streams, phi, scale, bias))


def post(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """Mix the streams and write the branch's output into each (Eq. 3): X'_o = Σ_i res[o, i] X_i + post_o · branch.

    Args:
        streams: [*, n, C].
        branch: [*, C], any floating dtype.
        post: [*, n].
        res: [*, n, n], `res[out, in]`.

    Returns:
        [*, n, C] in the streams' dtype.
    """
    mixed, written = post_terms(streams, branch, post, res)
    return (mixed + written).to(streams.dtype)


def post_terms(streams: Tensor, branch: Tensor, post: Tensor, res: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two terms of `post`, the streams mixed and the branch spread: [*, n, C], accumulation dtype."""
    dtype = accumulation_dtype(streams)
    return res.to(dtype) @ streams.to(dtype), post.to(dtype).unsqueeze(-1) * branch.to(dtype).unsqueeze(-2)


def post_backward(
    grad_streams: Tensor, streams: Tensor, branch: Tensor, post: Tensor, res: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `post` with respect to streams, branch, post and res."""
    dtype = accumulation_dtype(streams)
    grad = grad_streams.to(dtype)
    post_wide, branch_wide = post.to(dtype), branch.to(dtype)
    return (
        (res.to(dtype).mT @ grad).to(streams.dtype),
        (post_wide.unsqueeze(-2) @ grad).squeeze(-2).to(branch.dtype),
        (grad @ branch_wide.unsqueeze(-1)).squeeze(-1).to(post.dtype),
        (grad @ streams.to(dtype).mT).to(res.dtype),
    )


def head(
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    norm_eps: float = NORM_EPS,
    eps: float = 0.0,
    anchored: bool = False,
) -> tuple[Tensor, Tensor]:
    """Read the streams out by a learned, sigmoid-weighted sum (the head of DeepSeek-V4).

    Args:
        streams: [*, n, C].
        phi: [n, n·C].
        scale: [1].
        bias: [n].
        norm_eps: as in `pre`.
        eps: added to the weights.
        anchored: the streams are anchored (see `anchored`).

    Returns:
        [*, C] in the streams' dtype, and the projection [*, n + 1] as `pre` has it.
    """
    n, width = streams.shape[-2:]
    projection = torch.cat(_products(streams, phi, anchored), dim=-1)
    weights = torch.sigmoid(_logits(projection, scale, bias, n * width, norm_eps, (n,)).logits) + eps
    return _weighted_sum(streams, anchoring.read_weights(weights) if anchored else weights), projection.detach()


def head_backward(
    grad_output: Tensor,
    streams: Tensor,
    phi: Tensor,
    scale: Tensor,
    bias: Tensor,
    projection: Tensor,
    norm_eps: float,
    eps: float,
    anchored: bool = False,
) -> tuple[Tensor, ...]:
    """Return the gradients of `head` with respect to streams, phi, scale and bias, given its projection."""
    dtype = accumulation_dtype(streams)
    n, width = streams.shape[-2:]
    wide = anchoring.release(_wide(streams)) if anchored else _wide(streams)
    logits = _logits(projection, scale, bias, n * width, norm_eps, (n,))
    gate = torch.sigmoid(logits.logits)
    weights = gate + eps
    grad = grad_output.to(dtype)
    grad_weights = (wide @ grad.unsqueeze(-1)).squeeze(-1)
    grad_streams, *grads = _project_by_phi_backward(grad_weights * gate * (1.0 - gate), wide, logits, phi, scale, (n,))
    if anchored:
        grad_streams, weights = anchoring.release_backward(grad_streams), anchoring.read_weights(weights)
    grad_streams = grad_streams + weights.unsqueeze(-1) * grad.unsqueeze(-2)
    return _in_dtypes((grad_streams, *grads), (streams, phi, scale, bias))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor))


def _in_dtypes(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, tensors, strict=True))


def _groups(family: Manifold, n: int) -> tuple[int, ...]:
    return (n, n, family.rows(n) - 2 * n) if family.mixes else (n, n)


def _split(logits: Tensor, family: Manifold, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a token's logits into pre [*, n], post [*, n] and res's, [*, n, n] as `[out, in]` or [*, k]."""
    if family.mixes:
        pre_logits, post_logits, res_logits = logits.split(_groups(family, n), dim=-1)
        return pre_logits, post_logits, res_logits if family.logits else res_logits.unflatten(-1, (n, n))
    pre_logits, post_logits = logits.split((n, n), dim=-1)
    # Not `torch.eye`: made from the logits, it is a fake tensor where they are.
    identity = torch.diag_embed(logits.new_ones(n))
    return pre_logits, post_logits, identity.expand(*logits.shape[:-1], n, n)


def _spread(scale: Tensor, groups: tuple[int, ...]) -> Tensor:
    """Repeat each group's scale over the group's rows: [groups] -> [rows]."""
    return torch.cat([scale[index].expand(rows) for index, rows in enumerate(groups)])


def _products(streams: Tensor, phi: Tensor, anchored: bool) -> tuple[Tensor, Tensor]:
    wide = anchoring.release(_wide(streams)) if anchored else _wide(streams)
    flat = wide.flatten(-2)
    return flat @ phi.to(flat.dtype).mT, flat.square().sum(-1, keepdim=True)


def _logits(
    projection: Tensor, scale: Tensor, bias: Tensor, flat_width: int, norm_eps: float, groups: tuple[int, ...]
) -> _Logits:
    dtype = projection.dtype
    inverse_rms = torch.rsqrt(projection[..., -1:] / flat_width + norm_eps)
    # 1/RMS after the matmul: it must not scale the bias, and the product then reads raw streams once.
    found = projection[..., :-1]
    return _Logits(found * inverse_rms * _spread(scale.to(dtype), groups) + bias.to(dtype), found, inverse_rms)


def _project_by_phi_backward(
    grad_logits: Tensor,
    wide: Tensor,
    logits: _Logits,
    phi: Tensor,
    scale: Tensor,
    groups: tuple[int, ...],
    stored: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients with respect to the streams [*, n, C], phi, scale and bias, the last three `stored`."""
    _, found, inverse_rms = logits
    flat = wide.flatten(-2)
    rows = grad_logits.shape[-1]
    grad_normed = grad_logits * _spread(scale.to(flat.dtype), groups)
    grad_products = stored(grad_normed * inverse_rms)
    grad_inverse_rms = (grad_normed * found).sum(-1, keepdim=True)
    grad_flat = grad_products @ phi.to(flat.dtype) - grad_inverse_rms * inverse_rms**3 / flat.shape[-1] * flat
    few, tokens = grad_products.reshape(-1, rows), flat.reshape(-1, flat.shape[-1])
    grad_phi = (tokens.mT @ few).mT if in_columns(phi) else few.mT @ tokens
    per_row = (grad_logits * found * inverse_rms).reshape(-1, rows).sum(0)
    grad_scale = torch.stack([part.sum() for part in per_row.split(groups)])
    return grad_flat.unflatten(-1, wide.shape[-2:]), grad_phi, grad_scale, stored(grad_logits.reshape(-1, rows).sum(0))


def _weighted_sum(streams: Tensor, weights: Tensor) -> Tensor:
    dtype = accumulation_dtype(streams)
    return (weights.unsqueeze(-2) @ streams.to(dtype)).squeeze(-2).to(streams.dtype)
