"""The promise: once a model carries mHC parameters, its plain forward never runs silently.

Every child whose output a site writes into the stream has a forward pre-hook, which hands the site's parameters to the
operator `mhc::sentinel`. That is how they enter a graph: Dynamo lifts them as inputs like any other parameter, so equal
blocks share one graph, and FSDP or a loaded checkpoint may replace them. The role of a site and the options that decide
what is computed go along, for Dynamo to guard on: two models may differ in nothing else.

The operator raises. Inside a graph that backend="mhc" compiles, the rewrite takes the sentinel out together with the
add it stands for; on any other way to run the child, eagerly, behind a recompile limit or a graph break, under
`suppress_errors`, on another backend, in an exported program, the operator is still there.

A check that asks "am I being compiled?" would not do: Dynamo traces it into a frame that later falls back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import set_code_exec_strategy
from torch._dynamo.types import FrameAction, FrameExecStrategy

from ..errors import UnrewrittenCallError
from ..memory import MEMORY
from .entrances import BACKEND_NAME, compiling_backend, copy_entrances
from .plain_calls import OTHER_COMPILER, RootMark, plain_call_message, running_sites
from .site_parameters import parameters_of

_LIBRARY = torch.library.Library("mhc", "FRAGMENT")
_LIBRARY.define("sentinel(Tensor[] parameters, str[] labels, str[] roles, str options) -> ()")


_PLAIN_ALLOWED: ContextVar[bool] = ContextVar("mhc_plain_allowed", default=False)


@contextmanager
def plain_calls_allowed() -> Iterator[None]:
    """Inside, sentinels are silent: a look runs the model on stand-ins, whose results nobody takes for real ones."""
    token = _PLAIN_ALLOWED.set(True)
    try:
        yield
    finally:
        _PLAIN_ALLOWED.reset(token)


class Sentinel:
    """The hook of a child: calls the operator with the parameters of the sites that the child's output is written at.

    Attributes:
        owner: the module whose `mhc` child has the parameters; peft may put an adapter's copy in that child's place.
        labels: the sites' labels there.
    """

    def __init__(self, owner: nn.Module, labels: tuple[str, ...]) -> None:
        """Hold on to the sites of one owner."""
        self.owner = owner
        self.labels = labels

    def __deepcopy__(self, memo: dict[int, Any]) -> Sentinel:
        """Copy along with the owner; a child that is copied alone does not take its owner with it."""
        return Sentinel(memo.get(id(self.owner), self.owner), self.labels)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Run before the child's forward."""
        _refuse_export()
        owned = parameters_of(self.owner)
        if owned is None:
            return
        parameters: list[Tensor] = []
        roles: list[str] = []
        for label in self.labels:
            site = owned._modules[label]
            parameters += [site.phi, site.scale, site.bias]  # type: ignore[union-attr,list-item]
            roles.append(site.role)  # type: ignore[union-attr,arg-type]
        torch.ops.mhc.sentinel.default(parameters, list(self.labels), roles, owned.options)


class RootSentinel(RootMark):
    """The hook of the model itself, which no higher-order region hides from other compilers.

    In the body of an activation checkpoint they may drop a sentinel as dead code. Run as plain Python the model says
    nothing: the blocks that it calls may well be compiled, each alone, and their own sentinels know.
    """

    def __init__(self, root: nn.Module, copied: bool = False) -> None:
        """Note the model that it sits on, and whether that is a copy of the one that was attached."""
        self.root = root
        self.copied = copied

    def __deepcopy__(self, memo: dict[int, Any]) -> RootSentinel:
        """Know a copy of the model by its sentinel; what `attach` keeps beside the model is made for the copy, too."""
        copied = memo.get(id(self.root))
        if copied is None:
            return RootSentinel(self.root, copied=True)
        copy_entrances(self.root, memo)
        MEMORY.watched.add(copied)
        return RootSentinel(copied, copied=True)

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Run before the model's forward."""
        _refuse_export()
        # Traced, by Dynamo in this thread; torch.compiler.is_compiling() tells of other threads too.
        if torch.compiler.is_dynamo_compiling():
            torch.ops.mhc.sentinel.default([], [], [], "")
        elif compiling_backend() not in (None, BACKEND_NAME):
            _ask_backend()


def _ask_backend() -> None:
    """Be a graph of its own: a function around our backend hands it on, and any other compiler's code raises."""
    torch.ops.mhc.sentinel.default([], [], [], "")


def _refuse_export() -> None:
    """Fail while a program is exported, not when it first runs: an exported sentinel could only raise then.

    Raises:
        UnrewrittenCallError: `torch.export`, or what is built on it, traces the plain forward.
    """
    if torch.compiler.is_exporting():
        raise UnrewrittenCallError(EXPORT_MESSAGE)


# Where a model is compiled, its hooks run outside its forward's frame, and each would be a graph of its own. Dynamo is
# to run them as they are, and to stay in sight: it is asked which backend the forward will be given to.
for _function in (RootSentinel.__call__, _refuse_export):
    set_code_exec_strategy(_function.__code__, FrameExecStrategy(FrameAction.SKIP, FrameAction.DEFAULT))


EXPORT_MESSAGE = (
    "torch.export would export the plain forward of a model that carries mHC parameters. Call "
    "mhc_compile.export(model, *args), which exports the rewritten one in plain ATen; or mhc_compile.detach(model)."
)


def raise_if_plain(
    parameters: Sequence[Tensor], labels: Sequence[str], roles: Sequence[str] = (), options: str = ""
) -> None:
    """Refuse to run the plain forward of a module that carries mHC parameters.

    A child that is called by itself, outside its owner's forward, writes into no stream and runs.

    Raises:
        UnrewrittenCallError: a site of these labels is about to be a plain residual add.
    """
    if _PLAIN_ALLOWED.get():
        return
    if not labels:
        raise UnrewrittenCallError(OTHER_COMPILER)
    sites = running_sites(labels)
    if sites:
        raise UnrewrittenCallError(plain_call_message(sites[0]))


_LIBRARY.impl("sentinel", raise_if_plain, "CompositeExplicitAutograd")
torch.library.register_fake("mhc::sentinel", lambda parameters, labels, roles, options: None, lib=_LIBRARY)
# Without tensors out, every dead-code elimination would drop it.
torch.fx.node.has_side_effect(torch.ops.mhc.sentinel.default)


def arm(owner: nn.Module, children: Mapping[str, Sequence[nn.Module]]) -> bool:
    """Put sentinels on the children that an owner's sites write the output of.

    Args:
        owner: a module with mHC parameters.
        children: the children of each label. A site whose branch calls no child is watched at the owner itself.

    Returns:
        Whether a sentinel was missing.
    """
    labels: dict[int, tuple[nn.Module, list[str]]] = {}
    for label, modules in children.items():
        for module in modules or (owner,):
            labels.setdefault(id(module), (module, []))[1].append(label)
    changed = False
    for module, wanted in labels.values():
        known = _sentinel_of(module, owner)
        if known is None:
            module.register_forward_pre_hook(Sentinel(owner, tuple(wanted)))
        else:
            known.labels = tuple(dict.fromkeys((*known.labels, *wanted)))
        changed |= known is None
    return changed


def _sentinel_of(module: nn.Module, owner: nn.Module) -> Sentinel | None:
    return next((hook for hook in sentinels_on(module) if hook.owner is owner), None)


def sentinels_on(module: nn.Module) -> list[Sentinel]:
    """Return the sentinels of a child."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, Sentinel)]


def arm_root(root: nn.Module) -> None:
    """Put a sentinel on the model itself."""
    if not any(isinstance(hook, RootSentinel) for hook in root._forward_pre_hooks.values()):
        root.register_forward_pre_hook(RootSentinel(root))


def disarm(root: nn.Module, owner: nn.Module | None = None) -> None:
    """Take every sentinel below `root` away, or those of one owner."""
    for module in root.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            ours = isinstance(hook, Sentinel) and (owner is None or hook.owner is owner)
            if ours or (owner is None and isinstance(hook, RootSentinel)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
