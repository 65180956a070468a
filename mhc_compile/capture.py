"""What a backend call can learn about the frame that Dynamo is compiling: its modules, and why its graph ends.

Dynamo hands a backend only the graph. The translator that is at work (thread-local) knows the frame's variables, so
the modules behind `L['self']` and `G['model']` can be found, and whether the graph ends at a graph break.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from .errors import OwnerError

_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_\d+")
_ROOT_END = re.compile(r"\._(modules|parameters|buffers)\[")


@dataclass(frozen=True)
class Frame:
    """The frame behind one captured graph.

    Attributes:
        roots: the modules that the frame's graph reads from, the frame's own `self` first.
        paths: for the id of each module below a root: its path and the module.
        function: name of the frame's function; of the original one if the frame resumes behind a graph break.
        resumed: the frame resumes behind a graph break.
        break_reason: why the graph ends before its function does, with the source line; None if it does not.
    """

    roots: tuple[nn.Module, ...]
    paths: dict[int, tuple[str, nn.Module]] = field(repr=False)
    function: str
    resumed: bool
    break_reason: str | None

    @property
    def root(self) -> nn.Module:
        """The module that names are relative to.

        Raises:
            OwnerError: the frame shows no module.
        """
        if not self.roots:
            raise OwnerError(
                "backend='mhc' could not tell which module this graph belongs to. Compile the model itself, "
                "torch.compile(model, backend='mhc') or model.compile(backend='mhc'), so that its parameters have "
                "a home."
            )
        return self.roots[0]

    def module_at(self, key: str, path: str) -> tuple[str, nn.Module] | None:
        """Resolve one entry of a node's module stack, by identity where torch records it, else by path."""
        identity = key.split("@", 1)[0]
        if identity.isdigit() and int(identity) in self.paths:
            return self.paths[int(identity)]
        plain = re.sub(r"^[LG]\['\w+'\]\.?", "", path)
        for root in self.roots:
            try:
                return plain, root.get_submodule(plain)
            except AttributeError:
                continue
        return None


def current_frame(graph_module: GraphModule) -> Frame:
    """Describe the frame whose graph is being compiled; call it only inside a backend."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    translator = InstructionTranslator.current_tx()
    output = translator.output
    roots = _roots(graph_module, output.local_scope, output.global_scope)
    paths: dict[int, tuple[str, nn.Module]] = {}
    for root in roots:
        for path, module in root.named_modules():
            paths.setdefault(id(module), (path, module))
    name = output.root_tx.f_code.co_name
    resumed = _RESUMED.fullmatch(name)
    return Frame(
        roots=roots,
        paths=paths,
        function=resumed["function"] if resumed else name,
        resumed=resumed is not None,
        break_reason=_break_reason(output.compile_subgraph_reason),
    )


def _roots(
    graph_module: GraphModule, local_scope: dict[str, Any], global_scope: dict[str, Any]
) -> tuple[nn.Module, ...]:
    found: dict[int, nn.Module] = {}
    for name in ("self", "fn", *local_scope):
        value = local_scope.get(name)
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
    for node in graph_module.graph.nodes:
        name = source_name(node)
        if name is None or not (match := _ROOT_END.search(name)):
            continue
        try:
            value = eval(name[: match.start()], {"L": local_scope, "G": global_scope})
        except Exception:  # noqa: S112 - a source that needs more than L and G names no root
            continue
        if isinstance(value, nn.Module):
            found.setdefault(id(value), value)
    roots = tuple(found.values())
    below = {id(module) for root in roots for module in root.modules() if module is not root}
    return tuple(root for root in roots if id(root) not in below)


def source_name(node: Any) -> str | None:
    """Return where Dynamo read a placeholder from, such as "L['self']._modules['lm_head']._parameters['weight']"."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    # A method up to torch 2.10, a property since.
    name = source.name() if callable(source.name) else source.name
    return str(name)


def _break_reason(reason: Any) -> str | None:
    if reason is None or not reason.graph_break:
        return None
    text = str(reason.reason).strip().splitlines()[0] if reason.reason else "graph break"
    if reason.user_stack:
        frame = reason.user_stack[-1]
        text += f" ({frame.filename}:{frame.lineno}  {frame.line or ''})".replace("  )", ")")
    return text


def is_split_by_ddp(graph_module: GraphModule) -> bool:
    """Tell whether DDPOptimizer has cut this graph out of a larger one: a piece has lost Dynamo's sources."""
    from torch._dynamo.utils import get_optimize_ddp_mode
    from torch.nn.parallel import DistributedDataParallel

    if DistributedDataParallel._get_active_ddp_module() is None or get_optimize_ddp_mode() != "ddp_optimizer":
        return False
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    return any(source_name(node) is None for node in placeholders)


def inside_ddp() -> bool:
    """Tell whether the frame runs inside a DistributedDataParallel forward."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module() is not None
