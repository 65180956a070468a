"""Compare the sentinels of a captured graph with its plan: was every site that ran rewritten?"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from ..attachment.sentinels import raise_if_plain
from ..attachment.site_parameters import READOUT_SUFFIX, SiteParameters, owners_in, site_parameters
from ..dynamo.frames import Frame
from ..errors import UnrewrittenCallError
from ..passes.read_sentinels import SentinelCall
from .sites import Plan, without_call


def refuse_plain_sites(calls: tuple[SentinelCall, ...], plan: Plan, frame: Frame) -> None:
    """Check that every site whose owner's forward is in the graph was rewritten there.

    A site whose branch did not run (a cross-attention without encoder states) may be missing; one whose branch ran may
    not.

    Raises:
        UnrewrittenCallError: a site with parameters would run as a plain add.
    """
    owners = _owners(frame)
    rewritten = _rewritten(plan)
    plain = sorted(
        {
            site.name
            for call in calls
            for label, owner in _sites_of(call, owners)
            if _runs_inside(call, owner, frame) and not _answered(owner, label, rewritten)
            if (site := site_parameters(owner, label)) is not None
        }
    )
    if plain:
        broken = f" A graph break lies here: {frame.break_reason}." if frame.break_reason else ""
        raise UnrewrittenCallError(
            f"{len(plain)} sites that carry mHC parameters would run as plain residual adds in this graph: "
            f"{', '.join(plain[:4])}{', …' if len(plain) > 4 else ''}.{broken} The usual causes are a graph break "
            "inside a branch, a path that leaves the adds out of the graph (a fused layer in eval mode) or a filter "
            "that differs from the one they were attached with. mhc_compile.explain(model, …) shows what is found; "
            "mhc_compile.detach(model) gives back the plain model."
        )


def remaining_checks(calls: tuple[SentinelCall, ...], plan: Plan, frame: Frame) -> list[Callable[[], None]]:
    """Return the sentinels that the rewrite does not answer for; they are to run before the compiled graph does.

    A child that is compiled alone is one: whether it runs inside its owner's plain forward shows only at the call.
    """
    owners = _owners(frame)
    rewritten = _rewritten(plan)
    checks: list[Callable[[], None]] = []
    for call in calls:
        known = _sites_of(call, owners)
        inside = any(_runs_inside(call, owner, frame) for _, owner in known)
        answered = known and all(_answered(owner, label, rewritten) for label, owner in known)
        if call.labels and not inside and not answered:
            checks.append(functools.partial(raise_if_plain, (), list(call.labels)))
    return checks


_Owners = dict[int, tuple[nn.Module, str]]


def _owners(frame: Frame) -> _Owners:
    """Map the id of every phi that the frame can see to its owner and label."""
    tops = [module for module in (frame.outer, frame.model, *frame.roots) if module is not None]
    return {
        id(site.phi): (owner, label)
        for top in tops
        for _, owner, owned in owners_in(top)
        for label, site in owned._modules.items()
        if isinstance(site, SiteParameters)
    }


def _sites_of(call: SentinelCall, owners: _Owners) -> list[tuple[str, nn.Module]]:
    """Return label and owner of each site of a sentinel, found by the parameters themselves."""
    found = []
    for label, phi in zip(call.labels, call.tensors[::3], strict=True):
        known = owners.get(id(phi))
        if known is not None and not label.endswith(READOUT_SUFFIX):
            found.append((label, known[0]))
    return found


def _runs_inside(call: SentinelCall, owner: nn.Module, frame: Frame) -> bool:
    """Return whether the owner's own forward is around a sentinel in the graph."""
    around = (frame.module_at(key, path) for key, path in call.module_path)
    return any(found is not None and found[1] is owner for found in around) or any(
        root is owner for root in frame.roots
    )


def _rewritten(plan: Plan) -> set[tuple[int, str]]:
    return {(id(site.owner), label) for site in plan.sites for label in (site.label, site.branch_label)}


def _answered(owner: nn.Module, label: str, rewritten: set[tuple[int, str]]) -> bool:
    """Return whether a sentinel is answered for: its label names one call of several, the graph may hold another."""
    return any((id(owner), name) in rewritten for name in (label, without_call(label)))
