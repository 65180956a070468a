"""What a rewritten model has to compute, computed another way: by interpreting the plain graph that Dynamo captured.

The graph is run node by node. A value is a tensor, or, on a residual stream, a list of n tensors. At each site that the
report names, equations 3 to 8 of arXiv 2512.24880 are worked out here, on plain streams: nothing is shared with the
passes that rewrite, nor with the kernels. Taken from the finder: which adds are sites, which operand is the skip, and
in which dimension its features lie. What the branch reads, what lies on the stream between two adds, and who else reads
it, is read off the graph again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from mhc_compile.passes.find_residuals import find_residuals
from mhc_compile.passes.normalize import normalize
from mhc_compile.passes.open_regions import open_regions
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from mhc_compile import MHCConfig
from mhc_compile.reports.reporting import Chain, Report

_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_MIXING = ("linear", "conv", "matmul", "bmm", "attention")
_TAG = "oracle_name"


@dataclass(eq=False)
class _Site:
    """A residual add: `branch` reads `fork`, a stream value at or before `skip`; `mapping` is phi, scale and bias."""

    name: str
    add: Node
    skip_index: int
    dim: int
    before: list[_Site]
    last: bool = False
    skip: Any = None
    fork: Node | None = None
    fork_dim: int = 0
    trunk: list[Node] = field(default_factory=list)
    reader: Node | None = None
    chain: list[_Site] = field(default_factory=list)


def oracle(plain: nn.Module, report: Report, parameters: dict[str, Tensor], config: MHCConfig) -> Callable[..., Any]:
    """Return a function that takes a plain model's inputs and computes what the rewritten model should.

    Args:
        plain: the model, with no mHC parameters; its own parameters get gradients.
        report: what `attach` returned for the same model, with min_sites=1: the sites' names, chain by chain.
        parameters: the mHC parameters by name; they get gradients, too.
        config: the options that decide the function.
    """

    graphs = [graph.chains for graph in report.graphs]

    def backend(graph_module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return _Interpreter(open_regions(graph_module), graphs, parameters, config).run

    for owner in {site.owner for site in report.sites}:
        for path, module in plain.get_submodule(owner).named_modules(prefix=owner):
            module.oracle_path = path
            module.register_forward_pre_hook(_tell_apart)
    compiled = torch.compile(plain, backend=backend, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
            return compiled(*args, **kwargs)

    return run


def _tell_apart(module: nn.Module, args: Any) -> None:
    """Have Dynamo guard on the place of a module: equal blocks that it compiles alone would share one graph."""
    assert module.oracle_path is not None


class _Interpreter:
    def __init__(
        self,
        graph_module: GraphModule,
        reported: list[tuple[Chain, ...]],
        parameters: dict[str, Tensor],
        config: MHCConfig,
    ):
        self.graph_module, self.parameters, self.config = graph_module, parameters, config
        sites = _sites(graph_module, reported)
        _read_changed_values(graph_module.graph)
        self.order = {node: index for index, node in enumerate(graph_module.graph.nodes)}
        self.site_at = {site.add: site for site in sites}
        self.carried_by: dict[Node, set[Node]] = {}
        self.cuts: set[Node] = set()
        self.reads: dict[tuple[Node, Node], list[_Site]] = {}
        for site in sorted(sites, key=lambda site: self.order[site.add]):
            self._place(site)

    def _place(self, site: _Site) -> None:
        """Find the stream behind a site, the value that its branch reads, and the branch's readers of it."""
        operands = _operands(site.add)
        site.skip, branch = operands[site.skip_index], operands[1 - site.skip_index]
        behind_skip = self._ancestors(site.skip)
        previous = max((other for other in site.before if other.add in behind_skip), key=self._position, default=None)
        carriers: set[Node] = set()
        site.trunk = [site.skip]
        if previous is not None:
            carriers = self._descendants(previous.add, behind_skip)
            between = sorted({previous.add, *carriers}, key=self.order.__getitem__)
            cuts = [node for node in between if not _is_jumped_over(node, between, self.order)]
            site.trunk = [*reversed(cuts), *previous.trunk]
            self.cuts |= set(cuts)
            for node in carriers:
                self.carried_by[node] = {previous.add, *carriers}
        else:
            while (source := _same_size_input(site.trunk[-1])) is not None:
                site.trunk.append(source)
        branch_nodes = self._ancestors(branch)
        site.fork = next((value for value in site.trunk if value in branch_nodes), None)
        if site.fork is None:
            return
        width, shape = _shape(site.add)[site.dim], _shape(site.fork)
        dims = [site.dim] if shape == _shape(site.add) else [dim for dim, size in enumerate(shape) if size == width]
        if not dims:
            site.fork = None
            return
        site.fork_dim = dims[-1]
        on_the_stream = {*carriers, *site.trunk[: site.trunk.index(site.fork)]}
        for reader in site.fork.users:
            if reader in branch_nodes and reader not in on_the_stream:
                self.reads.setdefault((reader, site.fork), []).append(site)
                site.reader = reader

    def _position(self, site: _Site) -> int:
        return self.order[site.add]

    def _ancestors(self, node: Node) -> set[Node]:
        seen, stack = {node}, [node]
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return seen

    def _descendants(self, node: Node, among: set[Node]) -> set[Node]:
        seen: set[Node] = set()
        stack = [node]
        while stack:
            for user in stack.pop().users:
                if user in among and user not in seen:
                    seen.add(user)
                    stack.append(user)
        return seen

    def run(self, *inputs: Any) -> Any:
        self.values: dict[Node, Any] = {}
        self.streams: dict[Node, list[Tensor]] = {}
        self.coefficients: dict[_Site, tuple[Tensor, Tensor, Tensor]] = {}
        self.modes: dict[Node, bool] = {}
        arguments = iter(inputs)
        for node in self.graph_module.graph.nodes:
            self.modes[node] = torch.is_grad_enabled()
            if node.op == "placeholder":
                self.values[node] = next(arguments)
            elif node.op == "output":
                return map_arg(node.args[0], lambda value, node=node: self._plain(value, node))
            elif node in self.site_at:
                self.streams[node] = self._write(self.site_at[node])
            elif node in self.carried_by:
                self.streams[node] = [self._carried(node, index) for index in range(self.config.n_streams)]
            else:
                self.values[node] = self._call(node, lambda value, node=node: self._plain(value, node))
        raise AssertionError("a graph ends with its output")

    def _call(self, node: Node, read: Callable[[Node], Any]) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph_module)
        args, kwargs = map_arg((node.args, dict(node.kwargs)), read)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target = self.graph_module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if target is nn.functional.batch_norm:
            # Its backward on a CPU is wrong for [B, C, 1, W] where input and gradient differ in layout (torch 2.13).
            result = target(args[0].contiguous(), *args[1:], **kwargs)
            result.register_hook(lambda gradient: gradient.contiguous()) if result.requires_grad else None
            return result
        return target(*args, **kwargs)

    def _carried(self, node: Node, index: int) -> Any:
        inside = self.carried_by[node]
        return self._call(node, lambda value: self.streams[value][index] if value in inside else self._plain(value))

    def _plain(self, value: Node, reader: Node | None = None) -> Any:
        """Return what a reader gets: a branch its site's layer input, anyone else the streams collapsed."""
        sites = self.reads.get((reader, value)) if reader is not None else None
        if sites:
            return self._layer_input(sites[0])
        if value not in self.values:
            # What was made under `no_grad` is frozen, whoever reads it.
            with torch.set_grad_enabled(self.modes[value]):
                if value in self.site_at:
                    self.values[value] = self._collapsed(self.site_at[value])
                elif value in self.cuts:
                    self.values[value] = torch.stack(self.streams[value]).mean(0)
                else:  # a step inside a norm that is written out
                    self.values[value] = self._call(value, self._plain)
        return self.values[value]

    def _layer_input(self, site: _Site) -> Tensor:
        assert site.fork is not None
        layer_input, _, _ = self._mapping(site)
        return layer_input.movedim(-1, site.fork_dim).to(self._streams_of(site.fork)[0].dtype)

    def _streams_of(self, value: Node) -> list[Tensor]:
        return self.streams[value] if value in self.streams else [self.values[value]] * self.config.n_streams

    def _read_by(self, site: _Site, value: Node, reader: Node | None) -> list[Tensor]:
        """Return the streams that a site reads; inside another's branch, they begin with what that branch reads."""
        claims = self.reads.get((reader, value), []) if reader is not None else []
        around = [
            other for other in claims if other.chain is not site.chain and self._position(other) > self._position(site)
        ]
        return [self._layer_input(around[0])] * self.config.n_streams if around else self._streams_of(value)

    def _write(self, site: _Site) -> list[Tensor]:
        operands = _operands(site.add)
        factors = _factors(site.add)
        streams = self._read_by(site, operands[site.skip_index], site.add)
        skip = [factors[site.skip_index](value, self._plain) for value in streams]
        branch = factors[1 - site.skip_index](self._plain(operands[1 - site.skip_index], site.add), self._plain)
        dtype = skip[0].dtype if site.add.target in (*_IN_PLACE, "add_") else torch.result_type(skip[0], branch)
        _, post, res = self._mapping(site)
        if site.fork is None or _tokens(site.fork, site.fork_dim) != _tokens(site.add, site.dim):
            _, post, res = self._coefficients(site, _stacked(skip, site.dim))
        mixed = torch.einsum("...oi,...ic->...oc", res, _stacked(skip, site.dim))
        spread = torch.einsum("...o,...c->...oc", post, branch.double().movedim(site.dim, -1))
        return [stream.movedim(-1, site.dim).to(dtype).clone() for stream in (mixed + spread).unbind(-2)]

    def _mapping(self, site: _Site) -> tuple[Tensor, Tensor, Tensor]:
        if site not in self.coefficients:
            base, dim = (site.fork, site.fork_dim) if site.fork is not None else (site.skip, site.dim)
            streams = self._read_by(site, base, site.reader)
            self.coefficients[site] = self._coefficients(site, _stacked(streams, dim))
        return self.coefficients[site]

    def _projected(self, name: str, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return phi · vec(X) / rms(vec(X)), scale and bias (Eq. 5 to 7)."""
        phi, scale, bias = (self.parameters[f"{name}.{part}"].double() for part in ("phi", "scale", "bias"))
        flat = streams.reshape(*streams.shape[:-2], -1)
        rms = (flat.pow(2).sum(-1, keepdim=True) / flat.shape[-1] + 1e-6).sqrt()
        return torch.einsum("...k,rk->...r", flat / rms, phi), scale, bias

    def _coefficients(self, site: _Site, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return layer input [*, C], post [*, n] and res [*, out, in] from streams [*, n, C] (Eq. 5 to 9)."""
        n, manifold = self.config.n_streams, self.config.manifold
        z, scale, bias = self._projected(site.name, streams)
        pre = scale[0] * z[..., :n] + bias[:n]
        post = scale[1] * z[..., n : 2 * n] + bias[n : 2 * n]
        if manifold != "none":
            pre, post = pre.sigmoid(), 2 * post.sigmoid()
        if manifold == "identity":
            res = torch.eye(n, dtype=torch.float64).expand(*z.shape[:-1], n, n)
        else:
            res = (scale[2] * z[..., 2 * n :] + bias[2 * n :]).unflatten(-1, (n, n))
        if manifold == "sinkhorn":
            res = (res - res.amax((-1, -2), keepdim=True).detach()).exp()
            for _ in range(self.config.sinkhorn_iters):
                res = res / res.sum(-2, keepdim=True)
                res = res / res.sum(-1, keepdim=True)
        return torch.einsum("...i,...ic->...c", pre, streams), post, res

    def _collapsed(self, site: _Site) -> Tensor:
        """Return the mean of a site's streams; at a chain's end, what its readout says."""
        streams = self.streams[site.add]
        if not site.last or self.config.readout == "mean":
            return torch.stack(streams).mean(0)
        wide = _stacked(streams, site.dim)
        z, scale, bias = self._projected(site.name + "_readout", wide)
        out = torch.einsum("...i,...ic->...c", (scale * z + bias).sigmoid(), wide)
        return out.movedim(-1, site.dim).to(streams[0].dtype)


def _sites(graph_module: GraphModule, reported: list[tuple[Chain, ...]]) -> list[_Site]:
    """Tell which adds of a captured graph are the report's sites: both list them chain by chain, in order.

    The graph's chains go to the end of the list: of graphs that look alike, the next one's come next.
    """
    for node in graph_module.graph.nodes:
        node.meta[_TAG] = node.name
    captured = {node.name: node for node in graph_module.graph.nodes}
    found = find_residuals(normalize(graph_module)).chains
    locations = [[add.location for add in chain.adds] for chain in found]
    known = [[[site.location for site in chain.sites] for chain in chains] for chains in reported]
    assert locations in known, f"the report is of other graphs: {locations} is not in {known}"
    chains = reported.pop(known.index(locations))
    reported.append(chains)
    sites: list[_Site] = []
    for chain, reported in zip(found, chains, strict=True):
        chained: list[_Site] = []
        for add, public in zip(chain.adds, reported.sites, strict=True):
            node = captured[add.node.meta[_TAG]]
            skip_index = 0 if add.node.args[0] is add.skip else 1
            chained.append(_Site(public.name, node, skip_index, add.feature_dim, list(chained)))
        chained[-1].last = True
        for site in chained:
            site.chain = chained
        sites += chained
    return sites


def _read_changed_values(graph: Graph) -> None:
    """Let what reads a value behind an operation that changes it in place read that operation's result."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        # `operator.and_` bears its underscore for Python's sake.
        changes = name.endswith("_") and not name.endswith("__") and not hasattr(operator, name)
        in_place = node.target in _IN_PLACE or changes
        if (in_place or node.kwargs.get("inplace") is True) and node.args and isinstance(node.args[0], Node):
            node.args[0].replace_all_uses_with(node, lambda user, at=order[node]: order[user] > at)


def _operands(add: Node) -> tuple[Any, Any]:
    """Return what an add adds, before factors (`alpha`, the other terms of an `addcmul`)."""
    given = [*add.args, *(add.kwargs[name] for name in ("input", "other") if name in add.kwargs)]
    return given[0], given[1]


def _factors(add: Node) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return what an add does to each operand before it adds."""

    def scaled(value: Any, read: Callable[[Node], Any]) -> Any:
        if "addcmul" in str(getattr(add.target, "__name__", add.target)):
            return value * read(add.args[2]) * add.kwargs.get("value", 1)
        return value * add.kwargs["alpha"] if "alpha" in add.kwargs else value

    return lambda value, read: value, scaled


def _is_jumped_over(node: Node, between: list[Node], order: dict[Node, int]) -> bool:
    """Tell whether a way along the nodes `between` misses `node`."""
    at, inside = order[node], set(between)
    return any(order[user] > at for source in between if order[source] < at for user in source.users if user in inside)


def _same_size_input(node: Node) -> Node | None:
    name = str(getattr(node.target, "__name__", node.target))
    if node.op not in ("call_function", "call_method") or any(kind in name for kind in _MIXING):
        return None
    inputs = (source for source in node.all_input_nodes if source.op != "get_attr")
    return next((source for source in inputs if _size(source) == _size(node)), None)


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _size(node: Node) -> int:
    value = node.meta.get("example_value")
    return value.numel() if isinstance(value, Tensor) else -1


def _tokens(node: Node, dim: int) -> tuple[int, ...]:
    shape = list(_shape(node))
    del shape[dim]
    return tuple(shape)


def _stacked(streams: list[Tensor], dim: int) -> Tensor:
    """Return [*, n, C] in float64 from n values whose features lie in dimension `dim`."""
    return torch.stack([stream.double().movedim(dim, -1) for stream in streams], -2)
