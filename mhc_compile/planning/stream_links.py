"""Which chain of one graph goes on in which chain of another: found while a look runs the model on stand-ins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..config import MHCConfig
from ..dynamo.frames import Frame
from ..errors import MHCWarning, StreamCutError
from ..memory import MEMORY
from ..passes.residual import Reason
from .graph_breaks import cut_message
from .sites import Plan, PlannedChain, placed, without_chains

# A chain, by the number of its graph and its place there.
_ChainKey = tuple[int, int]


@dataclass(frozen=True)
class _Left:
    """A stream value that left a graph, with its version then."""

    value: Tensor
    version: int
    chain: _ChainKey


@dataclass
class StreamLinks:
    """Follows the values that leave one graph into the next.

    Attributes:
        strict: a stream that is lost between two graphs is an error; else what is behind stays plain.
        plans: the graphs in the order in which they were captured, each with its frame.
    """

    strict: bool = True
    plans: list[tuple[Plan, Frame]] = field(default_factory=list)
    _left: list[_Left] = field(default_factory=list)
    _lost: dict[_ChainKey, str] = field(default_factory=dict)
    _anew: list[tuple[Tensor, _Left]] = field(default_factory=list)
    _before: dict[_ChainKey, _ChainKey] = field(default_factory=dict)

    def add(self, plan: Plan, frame: Frame) -> int:
        """Add a captured graph and return its number."""
        self.plans.append((plan, frame))
        return len(self.plans) - 1

    def enter(self, number: int, inputs: Sequence[Any]) -> None:
        """Note what a graph is given.

        Raises:
            StreamCutError: Python code has computed a stream value anew on the way.
        """
        plan, frame = self.plans[number]
        for index, chain in enumerate(plan.chains):
            if chain.start is None:
                continue
            value = inputs[chain.start.position]
            same = [left for left in self._left if left.value is value and left.version == value._version]
            if same:
                self._before[number, index] = same[-1].chain
            elif (left := self._source_of(value)) is not None:
                self._lose((number, index), chain, left, frame)

    def _lose(self, key: _ChainKey, chain: PlannedChain, left: _Left, frame: Frame) -> None:
        """Refuse a chain whose stream was computed anew, or with `strict=False` leave it plain."""
        _, before = self.plans[left.chain[0]]
        reason = (
            f"Python code computes the hidden state anew between {before.function} and {frame.function}, before "
            f"{chain.sites[0].site.location}"
        )
        if MEMORY.breaks:
            reason = f"{MEMORY.breaks[-1].reason}; {reason}"
        if self.strict:
            raise StreamCutError(cut_message(reason, "between two graphs"))
        self._lost[key] = reason
        warnings.warn(
            f"{len(chain.selected)} residual adds stay plain, because their stream is lost: {reason}.",
            MHCWarning,
            stacklevel=2,
        )

    def leave(
        self, number: int, inputs: Sequence[Any], outputs: Sequence[Any], passing: Sequence[tuple[int, int]]
    ) -> None:
        """Note what a graph returns; `passing`: which of that is an input, over carriers alone."""
        for output, source in passing:
            left = self._source_of(inputs[source])
            if left is not None:
                self._anew.append((outputs[output], left))
        plan, _ = self.plans[number]
        for index, chain in enumerate(plan.chains):
            for leaving in chain.sites[-1].add.exits:
                value = outputs[leaving.position]
                self._left.append(_Left(value, value._version, (number, index)))

    def _source_of(self, value: Tensor) -> _Left | None:
        """Return the stream value that another value was computed from on the way between two graphs.

        Told by autograd; where the model switches it off, by form: a value of the same form that no graph has taken up.
        """
        for known, left in (*self._anew, *((left.value, left) for left in self._left)):
            if known is value:
                return left
        if value.grad_fn is None and not torch.is_grad_enabled():
            taken = set(self._before.values())
            form = (value.shape, value.dtype)
            open_ends = [left for left in self._left if (left.value.shape, left.value.dtype) == form]
            return next((left for left in reversed(open_ends) if left.chain not in taken), None)
        producers = {left.value.grad_fn: left for left in self._left if left.value.grad_fn is not None}
        stack, seen = [value.grad_fn], {value.grad_fn}
        while stack:
            node = stack.pop()
            if node in producers:
                return producers[node]
            for source, _ in node.next_functions if node is not None else ():
                if source is not None and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return None

    def placed_plans(self, config: MHCConfig) -> list[Plan]:
        """Return the plans, their sites with the roles that the whole model shows, without short streams."""
        behind = set(self._before.values())
        counts: dict[_ChainKey, int] = {}
        plans = []
        for number, (plan, _) in enumerate(self.plans):
            chains: list[PlannedChain] = []
            for index, chain in enumerate(plan.chains):
                key = (number, index)
                before = counts[self._before[key]] if key in self._before else 0
                counts[key] = before + len(chain.selected)
                chains.append(placed(chain, key not in self._before, key not in behind, before))
            plans.append(replace(plan, chains=tuple(chains)))
        lengths = dict(counts)
        for key in sorted(self._before, reverse=True):
            lengths[self._before[key]] = max(lengths[self._before[key]], lengths[key])
        for key in sorted(self._before):
            lengths[key] = lengths[self._before[key]]
        return [
            without_chains(plan, [self._why_out((number, index), lengths, config) for index in range(len(plan.chains))])
            for number, plan in enumerate(plans)
        ]

    def _why_out(self, key: _ChainKey, lengths: dict[_ChainKey, int], config: MHCConfig) -> tuple[Reason, str] | None:
        """Say why a chain stays plain: its stream is lost on the way, or too short."""
        lost: _ChainKey | None = key
        while lost is not None and lost not in self._lost:
            lost = self._before.get(lost)
        if lost is not None:
            return Reason.CUT, self._lost[lost]
        return (Reason.SHORT_CHAIN, str(lengths[key])) if lengths[key] < config.min_sites else None
