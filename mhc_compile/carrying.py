"""Run a compiled graph whose streams come from another graph, or go on to another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attachment.site_parameters import parameters_of
from .carried_streams import STREAMS
from .config import MHCConfig
from .errors import StreamCutError
from .planning.sites import Plan, PlannedChain, PlannedSite

Compiled = Callable[..., Any]


def carry_streams(compiled: Compiled, plan: Plan, config: MHCConfig) -> Compiled:
    """Hand a compiled graph the streams that it takes, and keep those that it returns.

    The graph takes streams behind Dynamo's inputs, and returns streams behind Dynamo's outputs, chain by chain.
    """
    entries = [(chain.entry.position, _place(chain.sites[0])) for chain in plan.chains if chain.entry is not None]
    leaves = [(leaving.position, _place(chain.sites[-1])) for chain in plan.chains for leaving in chain.exits]
    if not entries and not leaves:
        return compiled if config.on_graph_break == "collapse" else _watched(compiled, plan)

    def run(*inputs: Any) -> Any:
        taken = [STREAMS.take(inputs[position], site, config.check_carried) for position, site in entries]
        outputs = compiled(*inputs, *taken)
        visible = outputs[: len(outputs) - len(leaves)]
        for (position, origin), streams in zip(leaves, outputs[len(visible) :], strict=True):
            STREAMS.put(visible[position], streams, origin)
        return visible

    return run


def _watched(compiled: Compiled, plan: Plan) -> Compiled:
    """Notice that what was compiled as a model of its own is a piece of one.

    A model that its first call has attached was seen alone. If its stream comes in with what another such model has
    returned, the two are blocks of one model, and the streams were averaged between them.
    """
    alone = [chain for chain in plan.chains if _attached_on_first_call(chain)]
    starts = [(chain.start.position, _place(chain.sites[0])) for chain in alone if chain.start is not None]
    ends = [(leaving.position, _place(chain.sites[-1])) for chain in alone for leaving in chain.sites[-1].add.exits]
    if not starts and not ends:
        return compiled

    def run(*inputs: Any) -> Any:
        for position, site in starts:
            origin = STREAMS.ended_at(inputs[position])
            if origin is not None:
                raise StreamCutError(
                    f"{site} is given what {origin} has returned: blocks of one model are "
                    "compiled one by one, each as a model of its own, and the streams would be averaged between them. "
                    "Call mhc_compile.attach(model, example_input) on the whole model before the first call."
                )
        outputs = compiled(*inputs)
        for position, site in ends:
            STREAMS.put(outputs[position], None, site)
        return outputs

    return run


def _place(site: PlannedSite) -> str:
    """Return what messages call a site."""
    return f"{site.site.name} ({site.site.location})"


def _attached_on_first_call(chain: PlannedChain) -> bool:
    owned = parameters_of(chain.sites[0].owner)
    return owned is not None and owned.on_first_call
