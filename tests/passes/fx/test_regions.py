"""Opening and closing the bodies of higher-order operators; regions that switch autocast or gradients."""

import operator

import pytest
import torch
from mhc_compile.passes.close_regions import close_regions
from mhc_compile.passes.fx.grad_modes import grad_modes
from mhc_compile.passes.fx.regions import regions_of
from mhc_compile.passes.open_regions import open_regions
from mhc_compile.passes.residual import Reason
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch._higher_order_ops.wrap import wrap_with_autocast
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile import MHCConfig

from ...counting import unused_name
from ...models import QUICK, Block, Stack, assert_same_function, features


def _captured(model, *inputs):
    """Return Dynamo's graph of a model, opened inside the backend call."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(graph_module)
        return graph_module.forward

    torch.compile(model, backend=backend)(*inputs)
    return graphs[0]


def _targets(graph_module):
    return [str(node.target) for node in graph_module.graph.nodes if node.op in ("call_function", "call_method")]


class Checkpointed(Stack):
    def forward(self, values):
        hidden = self.stem(values)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, use_reentrant=False, determinism_check="none")
        return self.readout(hidden)


def test_a_graph_without_regions_is_left_alone():
    graph_module = _captured(Stack(), features())
    assert open_regions(graph_module) is graph_module
    assert close_regions(graph_module) is graph_module


def test_opening_and_closing_a_checkpoint():
    model = Checkpointed()
    graph_module = _captured(model, features())
    before = _targets(graph_module)
    opened = open_regions(graph_module)
    assert _targets(graph_module) == before
    assert sum(node.target is operator.add for node in opened.graph.nodes) == 4
    regions = list(dict.fromkeys(region for node in opened.graph.nodes for region in regions_of(node)))
    assert [region.path for region in regions] == [("tag_activation_checkpoint",), ("tag_activation_checkpoint_1",)]
    # Two calls, although Dynamo traced one body: each names the block that it runs.
    owners = [next(iter(node.meta["nn_module_stack"].values()))[0] for node in opened.graph.nodes if regions_of(node)]
    assert [owner.rsplit(".", 1)[-1] for owner in dict.fromkeys(owners)] == ["0", "1"]

    closed = close_regions(opened)
    calls = [node for node in closed.graph.nodes if "checkpoint" in str(node.target)]
    wanted = [node for node in graph_module.graph.nodes if "checkpoint" in str(node.target)]
    assert [node.kwargs for node in calls] == [node.kwargs for node in wanted]
    assert not any(regions_of(node) for part in closed.modules() for node in part.graph.nodes)
    assert all("example_value" in node.meta for node in closed.graph.nodes if node.target is operator.getitem)


def test_closed_paths_stay_closed():
    graph_module = _captured(Checkpointed(), features())
    half = open_regions(graph_module, closed={("tag_activation_checkpoint_1",)})
    assert sum("checkpoint" in target for target in _targets(half)) == 1
    assert sum(node.target is operator.add for node in half.graph.nodes) == 2


@torch.compiler.nested_compile_region
def _run_block(block, hidden):
    return block(hidden)


@torch.compiler.nested_compile_region
def _activate(hidden):
    return torch.tanh(torch.layer_norm(hidden, hidden.shape[-1:]))


class Nested(Stack):
    """Blocks in regions that are compiled once; a part of a branch in another, which no stream passes.

    Dynamo itself opens a region that is called only once.
    """

    def forward(self, values):
        hidden = self.stem(values)
        for block in self.blocks:
            hidden = _run_block(block, hidden)
        hidden = hidden + self.blocks[0].mlp(_activate(_activate(hidden)))
        return self.readout(hidden)


def test_nested_compile_region():
    model = Nested()
    plain = model(features())
    plain.sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    report = mhc_compile.attach(model, features())
    # One body serves both calls, and yet each block owns its sites.
    assert [site.name for site in report.sites[:4]] == [
        f"blocks.{index}.mhc.{branch}" for index in (0, 1) for branch in ("mixer", "mlp")
    ]
    assert len(report.sites) == 5
    model.zero_grad()
    seen = []

    def seeing(graph_module, inputs):
        seen.append(graph_module)
        return lookup_backend("aot_eager")(graph_module, inputs)

    torch._dynamo.register_backend(seeing, name="seeing_regions")
    out = torch.compile(model, backend="mhc", options={"inner": "seeing_regions"})(features())
    out.sum().backward()
    assert_same_function([plain.detach()], [out.detach()], 1e-5)
    originals = [p for name, p in model.named_parameters() if ".mhc." not in f".{name}"]
    assert_same_function(wanted, [parameter.grad for parameter in originals], 1e-3)
    # What no stream passes is not opened. (The graph before the last is the sentinel on the model itself.)
    assert sum("invoke_subgraph" in target for target in _targets(seen[-1])) == 2


class Autocasting(Stack):
    """One block under autocast, as a part of the forward."""

    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.blocks[1](hidden)
        return self.readout(hidden)


@pytest.mark.parametrize("fusion", ["site", "inductor"])
def test_the_operators_keep_their_precision_under_autocast(fusion):
    """With a branch that computes nothing in bf16, an autocast region must change nothing at all."""

    class Exact(Autocasting):
        def forward(self, values):
            hidden = self.stem(values)
            for _ in self.blocks:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.cast):
                    hidden = hidden + torch.fft.fft(hidden).real.float()
            return hidden

    model = Exact()
    model.cast = False
    mhc_compile.attach(model, features(), config=MHCConfig(init="paper"))
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape)
    results = []
    for model.cast in (False, True):
        torch._dynamo.reset()
        options = {"inner": "aot_eager", "fusion": fusion}
        results.append(torch.compile(model, backend="mhc", options=options)(features()))
    assert torch.equal(*results)


def test_an_autocast_region_around_sites():
    model = Autocasting()
    plain = model(features())
    report = mhc_compile.attach(model, features())
    assert len(report.sites) == 4
    assert_same_function([plain], [torch.compile(model, backend="mhc", options=QUICK)(features())], 2e-2)


def _step(hidden, weight):
    return hidden + functional.linear(functional.layer_norm(hidden, hidden.shape[-1:]), weight)


class Wrapping(Stack):
    """A step as the body of `wrap_with_autocast`. Dynamo takes bodies that read nothing but their arguments."""

    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        hidden = wrap_with_autocast("cpu", torch.bfloat16, True, None, _step, hidden, self.blocks[1].mixer.weight)
        return self.readout(self.blocks[1](hidden))


def test_autocast_as_a_higher_order_operator():
    model = Wrapping()
    plain = model(features())
    plain.float().square().sum().backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    seen = []
    backend = unused_name("seen")
    torch._dynamo.register_backend(lambda gm, inputs: seen.append(gm) or lookup_backend("eager")(gm, inputs), backend)
    report = mhc_compile.attach(model, features())
    assert [len(chain.sites) for chain in report.chains] == [5]
    out = torch.compile(model, backend="mhc", options={"inner": backend})(features())
    out.float().square().sum().backward()
    assert_same_function([plain], [out], 2e-2)
    originals = [p for name, p in model.named_parameters() if ".mhc." not in f".{name}"]
    assert_same_function(wanted, [parameter.grad for parameter in originals], 2e-2)
    # The region is closed again around the step's streams.
    graph = seen[-1]
    (call,) = (node for node in graph.graph.nodes if node.target is wrap_with_autocast)
    assert call.args[:4] == ("cpu", torch.bfloat16, True, None)
    assert "mhc.post.default" in _targets(getattr(graph, call.args[4].target))


class Frozen(Stack):
    """The first branch, or the first block, runs without gradients."""

    def __init__(self, whole):
        super().__init__()
        self.whole = whole

    def forward(self, values):
        hidden = self.stem(values)
        if self.whole:
            with torch.no_grad():
                hidden = self.blocks[0](hidden)
        else:
            with torch.no_grad():
                update = self.blocks[0].mixer(hidden)
            hidden = hidden + update
        return self.readout(self.blocks[1](hidden))


@pytest.mark.parametrize("whole", [False, True])
def test_a_part_without_gradients(whole):
    """The stream's gradient passes a frozen branch, as in the plain model; nothing passes a frozen block."""
    model = Frozen(whole)
    plain = model(features())
    plain.square().sum().backward()
    wanted = {name: p.grad for name, p in model.named_parameters()}
    assert (wanted["stem.weight"] is None) == whole
    model.zero_grad()
    mhc_compile.attach(model, features())
    out = torch.compile(model, backend="mhc", options=QUICK)(features())
    out.square().sum().backward()
    assert_same_function([plain], [out], 1e-5)
    for name, parameter in model.named_parameters():
        if name in wanted:
            assert (parameter.grad is None) == (wanted[name] is None), name
            if parameter.grad is not None:
                assert_same_function([wanted[name]], [parameter.grad], 1e-3)
    if not whole:
        # The branch is frozen, its mixing is not.
        assert mhc_compile.parameters(model)["mhc.blocks_0_mixer.bias"].grad.abs().max() > 0


def test_grad_modes_follow_the_switches():
    graph_module = _captured(Frozen(whole=False), features())
    modes = grad_modes(graph_module)
    off = [node for node, mode in modes.items() if not mode and node.op != "placeholder"]
    assert [node.name for node in off if "grad" not in node.name] == ["update"]


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, values):
        values = self.blocks[0](values)
        return torch.cond(values.sum() > 0, lambda value: self.blocks[1](value), torch.clone, (values,))


def test_an_add_in_a_body_that_cannot_be_opened_is_in_the_report():
    report = mhc_compile.explain(Conditional(), features())
    assert len(report.sites) == 2
    assert [entry.detail for entry in report.rejected if entry.reason is Reason.INSIDE_REGION] == ["cond", "cond"]
