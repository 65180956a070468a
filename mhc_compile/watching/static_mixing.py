"""What a site's coefficients are without its input: from its biases alone, as they would be at phi = 0.

The first thing that training moves, and cheap enough to look at in every step that is logged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attachment.site_parameters import READOUT_SUFFIX, SiteParameters, owners_in
from ..config import MHCConfig
from ..kernels.manifolds import MANIFOLDS


@dataclass(frozen=True)
class SiteMixing:
    """A site's coefficients at phi = 0, float32 on the CPU.

    Attributes:
        name: the site's dotted name.
        pre: [n], how much of each stream the branch reads.
        post: [n], how much of the branch each stream is written.
        res: [n, n], `res[out, in]`; the identity where streams do not mix.
        moved: how far all three are from where `init="preserve"` starts, the largest absolute difference.
        projection: root mean square of phi times the mean of |scale|: how much the input decides.
    """

    name: str
    pre: Tensor
    post: Tensor
    res: Tensor
    moved: float
    projection: float


def static_mixing(root: nn.Module) -> list[SiteMixing]:
    """Return the coefficients at phi = 0 of every site below `root`, in the order of its modules."""
    found = []
    for _, _, owned in owners_in(root):
        for label, site in owned._modules.items():
            if isinstance(site, SiteParameters) and not label.endswith(READOUT_SUFFIX):
                found.append(_mixing(site, owned.config))
    return found


@torch.no_grad()
def _mixing(site: SiteParameters, config: MHCConfig) -> SiteMixing:
    now = _coefficients(site.bias.detach().float().cpu(), config)
    start = _coefficients(site.start.values(site.name)["bias"].float(), config)
    moved = max(float((left - right).abs().max()) for left, right in zip(now, start, strict=True))
    projection = float(site.phi.detach().float().square().mean().sqrt() * site.scale.detach().float().abs().mean())
    return SiteMixing(site.name, *now, moved, projection)


def _coefficients(bias: Tensor, config: MHCConfig) -> tuple[Tensor, Tensor, Tensor]:
    manifold, n = MANIFOLDS[config.manifold], config.n_streams
    pre, post = bias[:n], bias[n : 2 * n]
    if manifold.gated:
        pre, post = torch.sigmoid(pre), 2.0 * torch.sigmoid(post)
    if not manifold.mixes:
        return pre, post, torch.eye(n)
    return pre, post, manifold.project(bias[2 * n :].reshape(n, n), config.sinkhorn_iters, 0.0)
