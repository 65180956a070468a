"""Pipeline schedules by the clock: when each rank computes, sends and waits. The schedules are torch's own.

`torch.distributed.pipelining` makes a table of actions for each rank, with the sends and receives between them; here it
is played through with times for the actions and for a transfer. Sends and receives do not hold up a rank; a
transfer begins once both are posted and those before it on the same way are through; a computation waits for what it
was sent. Schedules of one stage a rank run in loops of torch's own, which receive right before they compute; that of
1F1B also waits for its sends between a forward and a backward.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from ..errors import MHCOptionError

FORWARD, BACKWARD, INPUT_BACKWARD, WEIGHT_BACKWARD = "F", "B", "I", "W"
_COMPUTE = (FORWARD, BACKWARD, INPUT_BACKWARD, WEIGHT_BACKWARD)
# Each kind of transfer: what is computed from it, and the step from the sender's stage to the receiver's.
_SENDS = {"SEND_F": (FORWARD, 1), "SEND_B": (BACKWARD, -1)}
_RECEIVES = {"RECV_F": FORWARD, "RECV_B": BACKWARD}


@dataclass(frozen=True)
class Action:
    """One entry of a schedule.

    Attributes:
        kind: "F", "B" (the whole backward), "I" and "W" (its two parts), "SEND_F", "RECV_F", "SEND_B" or "RECV_B".
        stage: whose it is.
        microbatch: its number.
    """

    kind: str
    stage: int
    microbatch: int


@dataclass(frozen=True)
class Schedule:
    """What each rank does, in order.

    Attributes:
        name: as torch spells it.
        stages: their number.
        microbatches: their number.
        rank_of: for each stage, its rank.
        actions: for each rank.
        waits_for_sends: where a rank changes from forwards to backwards or back.
    """

    name: str
    stages: int
    microbatches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]
    waits_for_sends: bool = False

    def sends(self, rank: int) -> int:
        """Return how many tensors a rank sends in a step."""
        return sum(action.kind in _SENDS for action in self.actions[rank])

    def most_alive(self, stage: int) -> int:
        """Return the largest number of microbatches that a stage holds activations of at once."""
        alive = most = 0
        for action in self.actions[self.rank_of[stage]]:
            if action.stage == stage:
                alive += (action.kind == FORWARD) - (action.kind in (BACKWARD, WEIGHT_BACKWARD))
                most = max(most, alive)
        return most


@dataclass(frozen=True)
class Span:
    """When an action or a transfer ran, in seconds from the start of the step.

    Attributes:
        rank: that computes or receives.
        action: what.
        start: begin.
        end: end.
    """

    rank: int
    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step by the clock.

    Attributes:
        spans: of the computations and the transfers, in no order.
    """

    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """From the first computation's start to the last one's end."""
        return max(span.end for span in self.spans if span.action.kind in _COMPUTE)

    def busy(self, rank: int) -> float:
        """Return the seconds that a rank computes."""
        return sum(span.end - span.start for span in self.spans if span.rank == rank and span.action.kind in _COMPUTE)


def stages_per_rank(name: str) -> int:
    """Return how many stages each rank holds: one, or for schedules of several, two.

    Raises:
        MHCOptionError: torch has no such schedule.
    """
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle

    return 1 if issubclass(_schedule_class(name), PipelineScheduleSingle) else 2


def schedule_of(name: str, ranks: int, microbatches: int) -> Schedule:
    """Return a schedule of torch's for a number of ranks.

    Raises:
        MHCOptionError: torch has no such schedule, or it does not take so many microbatches.
    """
    from torch.distributed.pipelining import schedules as torch_schedules

    kind = _schedule_class(name)
    per_rank = stages_per_rank(name)
    count = ranks * per_rank
    # What a schedule asks of its stages before it runs.
    stages: Any = [
        SimpleNamespace(
            num_stages=count, group_size=ranks, group_rank=0, stage_index=index, is_first=False, is_last=False,
            submod=nn.Identity(), has_backward=True,
        )
        for index in range(per_rank)
    ]  # fmt: skip
    try:
        made: Any = kind(stages if per_rank > 1 else stages[0], microbatches)
    except ValueError as error:
        raise MHCOptionError(f"{name} with {ranks} ranks and {microbatches} microbatches: {error}") from error
    if per_rank > 1:
        table, rank_of = made.pipeline_order_with_comms, made.stage_index_to_group_rank
    else:
        rank_of = {index: index for index in range(count)}
        order = {rank: _numbered(actions) for rank, actions in _order_of(made).items()}
        table = torch_schedules._add_send_recv(order, lambda stage: rank_of[stage], count)
    lists = [_actions(table[rank]) for rank in range(ranks)]
    return Schedule(
        name=kind.__name__.removeprefix("Schedule"),
        stages=count,
        microbatches=microbatches,
        rank_of=tuple(rank_of[stage] for stage in range(count)),
        actions=tuple(tuple(actions if per_rank > 1 else _received_late(actions)) for actions in lists),
        waits_for_sends=kind is torch_schedules.Schedule1F1B,
    )


def play(schedule: Schedule, seconds: Callable[[str, int], float], transfer: float) -> Timeline:
    """Play a schedule through.

    Args:
        schedule: of any kind.
        seconds: what an action ("F", "B", "I", "W") of a stage takes.
        transfer: what sending a tensor from a rank to the next takes.
    """
    return _Player(schedule, seconds, transfer).play()


class _Player:
    def __init__(self, schedule: Schedule, seconds: Callable[[str, int], float], transfer: float) -> None:
        self.schedule = schedule
        self.seconds = seconds
        self.transfer = transfer
        self.clock = [0.0] * len(schedule.actions)
        # What each rank computed last, "F" or "B".
        self.before: list[str | None] = [None] * len(schedule.actions)
        self.spans: list[Span] = []
        # A transfer, by the computation that waits for it: "F" or "B", stage, microbatch.
        self.sent: dict[Action, tuple[float, int, int]] = {}
        self.awaited: dict[Action, float] = {}
        self.arrived: dict[Action, float] = {}
        # For each way from one rank to another: the transfers on it that were not through yet, and when it is free.
        self.queues: dict[tuple[int, int], list[Action]] = {}
        self.free: dict[tuple[int, int], float] = {}

    def play(self) -> Timeline:
        left = [list(actions) for actions in self.schedule.actions]
        while any(left):
            before = sum(map(len, left))
            for rank, actions in enumerate(left):
                while actions and self._step(rank, actions[0]):
                    actions.pop(0)
            if sum(map(len, left)) == before:
                raise AssertionError(f"{self.schedule.name} does not go on: {[actions[:1] for actions in left]}")
        return Timeline(tuple(self.spans))

    def _step(self, rank: int, action: Action) -> bool:
        """Have a rank do its next action, if what that waits for is known."""
        if action.kind in _SENDS:
            kind, step = _SENDS[action.kind]
            key = Action(kind, action.stage + step, action.microbatch)
            way = (rank, self.schedule.rank_of[key.stage])
            self.sent[key] = (self.clock[rank], *way)
            self.queues.setdefault(way, []).append(key)
            self._deliver(way)
        elif action.kind in _RECEIVES:
            key = Action(_RECEIVES[action.kind], action.stage, action.microbatch)
            self.awaited[key] = self.clock[rank]
            if key in self.sent:
                self._deliver(self.sent[key][1:])
        else:
            kind = FORWARD if action.kind == FORWARD else BACKWARD
            key = Action(kind, action.stage, action.microbatch)
            waited = [key] if key in self.awaited and action.kind != WEIGHT_BACKWARD else []
            if self.schedule.waits_for_sends and self.before[rank] not in (None, kind):
                waited += [sent for sent, (_, source, _) in self.sent.items() if source == rank]
            if any(key not in self.arrived for key in waited):
                return False
            self.clock[rank] = max([self.clock[rank], *(self.arrived[key] for key in waited)])
            self.before[rank] = kind
            start = self.clock[rank]
            self.clock[rank] += self.seconds(action.kind, action.stage)
            self.spans.append(Span(rank, action, start, self.clock[rank]))
        return True

    def _deliver(self, way: tuple[int, int]) -> None:
        """Let through what both ends of a way have posted, in the order of the sends."""
        queue = self.queues[way]
        while queue and queue[0] in self.awaited:
            key = queue.pop(0)
            start = max(self.sent[key][0], self.awaited[key], self.free.get(way, 0.0))
            self.arrived[key] = self.free[way] = start + self.transfer
            received = Action("RECV_F" if key.kind == FORWARD else "RECV_B", key.stage, key.microbatch)
            self.spans.append(Span(way[1], received, start, self.arrived[key]))


def _schedule_class(name: str) -> Any:
    from torch.distributed.pipelining.schedules import get_schedule_class

    try:
        found = get_schedule_class(name)
    except ValueError as error:
        raise MHCOptionError(f"{error}") from error
    if found.__abstractmethods__ or found.__name__.startswith("Pipeline"):
        raise MHCOptionError(f"{name} is what schedules are made from, and none itself.")
    return found


def _order_of(made: Any) -> Mapping[int, Any]:
    order: Mapping[int, Any] | None = made._get_pipeline_order()
    if order is None:
        raise MHCOptionError(f"torch shows no table of {type(made).__name__}.")
    return order


def _numbered(actions: Any) -> list[Any]:
    """Number the forwards of a rank with one stage in order: torch 2.13 gives those of 1F1B's last rank 1, 2, …"""
    numbers = itertools.count()
    return [
        action._replace(microbatch_index=next(numbers)) if action.computation_type.name == "FORWARD" else action
        for action in actions
        if action is not None
    ]


def _received_late(actions: list[Action]) -> list[Action]:
    """Put each receive right before what is computed from it."""
    waiting = {(_RECEIVES[one.kind], one.stage, one.microbatch): one for one in actions if one.kind in _RECEIVES}
    found = []
    for action in actions:
        if action.kind not in _RECEIVES:
            received = waiting.get((action.kind, action.stage, action.microbatch))
            found += [received, action] if received is not None else [action]
    return found


def _actions(entries: Any) -> list[Action]:
    """Return torch's actions as ours; what overlaps, torch runs one after the other (2.11 to 2.15)."""
    found = []
    for entry in entries:
        for one in entry.sub_actions or (entry,):
            kind = _KINDS.get(one.computation_type.name)
            if kind is not None:
                found.append(Action(kind, one.stage_index, one.microbatch_index))
    return found


# Those that are not here move parameters of a data-parallel group.
_KINDS = {
    "FORWARD": FORWARD, "FULL_BACKWARD": BACKWARD, "BACKWARD_INPUT": INPUT_BACKWARD, "BACKWARD_WEIGHT": WEIGHT_BACKWARD,
    "SEND_F": "SEND_F", "RECV_F": "RECV_F", "SEND_B": "SEND_B", "RECV_B": "RECV_B",
}  # fmt: skip
