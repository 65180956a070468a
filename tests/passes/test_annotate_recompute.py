"""Selective recomputation, shown by counting what is saved and what runs again, and by equal gradients."""

import math

import pytest
import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.passes.annotate_recompute import POLICY, annotate_recompute
from torch import nn
from torch.nn.functional import dropout, gelu
from torch.utils.checkpoint import checkpoint

import mhc_compile
from mhc_compile import MHCConfig, backend

from ..models import CASES, Stack, features, token_ids
from ..saved import Recorder

TOKENS, WIDTH = 10, 32
MATMULS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
# Of each site at four streams: post, res and the projection.
KEPT = (4 + 16) + (24 + 1)
ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu.default"


class PreNorm(nn.Module):
    """One transformer-like branch a site, which ends in a linear map: nothing but the stream reads its output."""

    def __init__(self, sites=6, width=WIDTH):
        super().__init__()
        self.stem, self.readout = nn.Linear(width, width), nn.Linear(width, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(sites))
        self.ups = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(sites))
        self.downs = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(sites))

    def branch(self, site, hidden):
        return self.downs[site](gelu(self.ups[site](self.norms[site](hidden))))

    def forward(self, features):
        hidden = self.stem(features)
        for site in range(len(self.norms)):
            hidden = hidden + self.branch(site, hidden)
        return self.readout(hidden)


class Checkpointed(PreNorm):
    """Branches that the user has checkpointed."""

    def branch(self, site, hidden):
        return checkpoint(super().branch, site, hidden, use_reentrant=False)


class DroppedStream(PreNorm):
    """Dropout on the stream itself, between two sites."""

    def forward(self, features):
        hidden = self.stem(features)
        for site in range(len(self.norms)):
            hidden = dropout(hidden + self.branch(site, hidden), 0.3, self.training)
        return self.readout(hidden)


class BatchNormed(PreNorm):
    """A norm with running statistics on the stream."""

    def __init__(self, sites=3):
        super().__init__(sites)
        self.on_stream = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(sites))

    def forward(self, features):
        hidden = self.stem(features)
        for site, norm in enumerate(self.on_stream):
            hidden = norm(hidden + self.branch(site, hidden))
        return self.readout(hidden)


class ReadInTheMiddle(PreNorm):
    """Two values on the stream are returned beside the output."""

    def forward(self, features):
        hidden = self.stem(features)
        values = []
        for site in range(len(self.norms)):
            hidden = hidden + self.branch(site, hidden)
            values.append(hidden)
        return self.readout(hidden), values[0], values[2]


def _trained(build, dtype=torch.float32, **config):
    """Return a model in train mode whose mHC parameters are far from their init."""
    torch.manual_seed(0)
    model = build().to(dtype).train()
    # Few iterations: inlined, each is a dozen nodes.
    config = MHCConfig(init="paper", sinkhorn_iters=2, **config)
    mhc_compile.attach(model, _inputs(model, dtype), config=config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def pre_norm():
    """One model for every test that only compiles it."""
    return _trained(PreNorm)


def _inputs(model, dtype):
    return token_ids() if hasattr(model, "config") else features(TOKENS).to(dtype)


def _step(model, backend_name, dtype=torch.float32, **options):
    """Run one forward and backward from a fixed seed; return the output and every gradient."""
    torch._dynamo.reset()
    model.zero_grad()
    torch.manual_seed(5)
    out = torch.compile(model, backend=backend_name, **options)(_inputs(model, dtype))
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.float().square().sum().backward()
    return out.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def _recorded(model, dtype=torch.float32, **options):
    recorder = Recorder()
    results = _step(model, "mhc", dtype, options={"inner": recorder.name, **options})
    return recorder.last, results


def _plain(build, dtype=torch.float32):
    torch.manual_seed(0)
    recorder = Recorder()
    _step(build().to(dtype).train(), recorder.name, dtype)
    return recorder.last


def _equal(left, right):
    return torch.equal(left[0], right[0]) and all(
        torch.equal(one, other) for one, other in zip(left[1], right[1], strict=True)
    )


def _stored(sites, interval):
    """Return how many n-stream values lie between the stored ones' intervals; the first is made from the head."""
    return math.ceil(sites / interval) - 1


@pytest.mark.parametrize("sites", [8, 14])
def test_bytes_saved_are_those_of_the_cost_model(sites):
    n, interval = 4, traffic.recompute_interval(sites, 4)
    partition, _ = _recorded(_trained(lambda: PreNorm(sites)), recompute="auto")
    # The plain model keeps the stream before each site and behind the last; the rest is the branches' own.
    unit = TOKENS * WIDTH * 4
    branches = _plain(lambda: PreNorm(sites)).saved_bytes - (sites + 1) * unit
    numbers = {"sites": sites, "interval": interval, "n_streams": n, "width": WIDTH}
    held = traffic.evaluate(traffic.held_elements(True), **numbers) - (n + 2) * WIDTH * interval
    coefficients = TOKENS * 4 * sites * KEPT
    assert partition.saved_bytes == pytest.approx(branches + TOKENS * 4 * held + coefficients, rel=0.05)
    # To the byte: coefficients, head, branches' outputs and readout [*, C]; the first streams are copies of the head.
    assert partition.saved_bytes == branches + unit * (1 + sites + 1 + n * _stored(sites, interval)) + coefficients
    # What a branch computes does not run again: transposes of weights are views.
    added = {
        "mhc.collapse.default": sites,
        "mhc.measure.default": 0,
        "mhc.post.default": sites - 1 - _stored(sites, interval),
    }
    assert {name: partition.rerun()[name] for name in added} == added
    assert not set(partition.rerun()) & {*MATMULS, "aten.gelu.default", "aten.native_layer_norm.default"}


# At four streams, the tests around this one.
@pytest.mark.parametrize(("n_streams", "intervals"), [(1, (2,)), (2, (1, 3)), (5, (4, 5, 100))])
def test_an_interval_stores_every_so_many_sites(n_streams, intervals):
    model = _trained(PreNorm, n_streams=n_streams)
    stored, unannotated = _recorded(model, recompute="none")
    for interval in intervals:
        partition, results = _recorded(model, recompute=interval)
        streams = [node for node in partition.saved if str(node.target) == "mhc.post.default"]
        assert len(streams) == _stored(6, interval)
        assert all(node.meta["val"].shape == (TOKENS, n_streams, WIDTH) for node in streams)
        assert _equal(results, unannotated)
        assert partition.saved_bytes < stored.saved_bytes
        assert partition.count(*MATMULS) == stored.count(*MATMULS)


def test_fused_boundaries_store_the_layer_input_with_the_streams(pre_norm):
    interval = 2
    partition, results = _recorded(pre_norm, recompute=interval, fusion="boundary")
    apart, _ = _recorded(pre_norm, recompute=interval)
    assert partition.saved_bytes == apart.saved_bytes + _stored(6, interval) * TOKENS * WIDTH * 4
    # A replay takes the coefficients as they were kept: it projects nothing.
    rerun = partition.rerun()
    assert rerun["mhc.post_collapse.default"] == 5 - _stored(6, interval)
    assert not rerun.keys() & {"mhc.post_pre.default", "mhc.post_measure.default", "mhc.measure.default"}
    assert _equal(results, _recorded(pre_norm, recompute="none", fusion="boundary")[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_inlined_operators_store_the_same_as_opaque_ones(dtype):
    sites = 4
    model = _trained(lambda: PreNorm(sites), dtype)
    inlined, results = _recorded(model, dtype, recompute=3, fusion="inductor")
    opaque, _ = _recorded(model, dtype, recompute=3)
    # The derivative of an inlined Sinkhorn replays it, so that post and res need not be kept.
    assert inlined.saved_bytes == opaque.saved_bytes - TOKENS * 4 * sites * (4 * 4 + 4)
    # No cast to float32 and no Sinkhorn iterate among them.
    streams = [node.meta["val"] for node in inlined.saved if node.meta["val"].dim() == 3]
    assert [value.dtype for value in streams] == [dtype] * _stored(sites, 3)
    assert _equal(results, _recorded(model, dtype, recompute="none", fusion="inductor")[1])


def _dropped_branches():
    return Stack(2, dropout=0.3)


def _dropped_stream():
    return DroppedStream(sites=3)


@pytest.mark.parametrize(
    ("build", "fusion"),
    [
        (_dropped_branches, "site"),
        (_dropped_branches, "inductor"),
        (_dropped_stream, "site"),
        (_dropped_stream, "inductor"),
        (BatchNormed, "site"),
    ],
)
def test_random_operators_and_running_statistics_do_not_run_again(build, fusion):
    model = _trained(build)
    before = {name: value.clone() for name, value in model.named_buffers()}
    partition, results = _recorded(model, recompute=2, fusion=fusion)
    after = {name: value.clone() for name, value in model.named_buffers()}
    random = {"aten.native_dropout.default", "aten.bernoulli.p", "aten.bernoulli_.float", "aten.rand.default"}
    forward = {str(node.target) for node in partition.forward.graph.nodes}
    assert random & forward or before
    assert not set(partition.rerun()) & {*random, "aten._native_batch_norm_legit_functional.default"}
    # A random operator that is to run again gets another name, and its generator's state.
    assert not any("rng" in str(node.target) for node in partition.backward.graph.nodes)
    model.load_state_dict(before, strict=False)
    stored, unannotated = _recorded(model, recompute="none", fusion=fusion)
    assert _equal(results, unannotated)
    assert all(torch.equal(value, after[name]) for name, value in model.named_buffers())
    assert partition.saved_bytes < stored.saved_bytes


# With dropout on attention weights, as in BERT, attention is traced as its parts.
@pytest.mark.parametrize(
    ("name", "attention", "fusion"),
    [("llama", ATTENTION, "boundary"), ("bert", "aten._safe_softmax.default", "site")],
)
def test_architectures_give_the_same_gradients_and_rerun_no_branch(name, attention, fusion):
    model = _trained(CASES[name]().build)
    partition, results = _recorded(model, recompute="auto", fusion=fusion)
    stored, unannotated = _recorded(model, recompute="none", fusion=fusion)
    assert _equal(results, unannotated)
    assert partition.saved_bytes < stored.saved_bytes
    # The backward of a linear map is matmuls too: none may be added.
    assert partition.count(*MATMULS, attention) == stored.count(*MATMULS, attention)
    assert attention in {str(node.target) for node in partition.forward.graph.nodes}
    assert not set(partition.rerun()) & {*MATMULS, attention}


@pytest.mark.parametrize("fusion", ["site", "inductor"])
def test_a_learned_readout_and_readers_in_the_middle(fusion):
    model = _trained(lambda: ReadInTheMiddle(sites=4), readout="learned")

    def step(**options):
        torch._dynamo.reset()
        model.zero_grad()
        options = {"inner": "aot_eager", "fusion": fusion, **options}
        outputs = torch.compile(model, backend="mhc", options=options)(features(TOKENS))
        sum(out.square().sum() for out in outputs).backward()
        return torch.cat([out.detach() for out in outputs], -1), [parameter.grad for parameter in model.parameters()]

    assert _equal(step(recompute=2), step(recompute="none"))


@pytest.fixture(scope="module")
def checkpointed():
    return _trained(lambda: Checkpointed(sites=5))


# What a stored site reads is for its own backward alone, unless its operator is inlined: there the region runs whole.
@pytest.mark.parametrize(("fusion", "whole"), [("site", 2), ("boundary", 2), ("inductor", 0)])
def test_a_users_own_checkpoints_still_hold(checkpointed, fusion, whole):
    partition, results = _recorded(checkpointed, recompute=2, fusion=fusion)
    stored, unannotated = _recorded(checkpointed, recompute="none", fusion=fusion)
    assert _equal(results, unannotated)
    assert partition.saved_bytes < stored.saved_bytes
    # Each region runs its first linear map again, as asked for; its last, which a replay reads, is stored.
    assert (partition.rerun()["aten.addmm.default"], partition.rerun()["aten.gelu.default"]) == (5 + whole, 5)
    outputs = [node for node in partition.saved if str(node.target) == "aten.addmm.default"]
    assert len(outputs) == 1 + 5 - whole


def test_inference_is_the_same():
    model = _trained(lambda: PreNorm(3)).eval()
    outputs = []
    for recompute in ("none", 2):
        for fusion in ("site", "inductor"):
            torch._dynamo.reset()
            options = {"inner": "aot_eager", "recompute": recompute, "fusion": fusion}
            with torch.no_grad():
                outputs.append(torch.compile(model, backend="mhc", options=options)(features(TOKENS)))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


@pytest.mark.parametrize(
    ("fusion", "recompute", "sites"), [("site", "auto", 4), ("boundary", 2, 3), ("inductor", 2, 3)]
)
def test_one_compilation_serves_every_batch_and_length(fusion, recompute, sites):
    model = _trained(lambda: PreNorm(sites))
    recorder = Recorder()
    options = {"inner": recorder.name, "recompute": recompute, "fusion": fusion}
    compiled = torch.compile(model, backend="mhc", options=options, dynamic=True)
    for batch, length in ((2, 8), (3, 11), (5, 16)):
        tokens = features(batch * length).view(batch, length, WIDTH)
        model.zero_grad()
        out = compiled(tokens)
        out.square().sum().backward()
    assert len(recorder.partitions) == 1
    symbolic = [node for node in recorder.last.saved if node.meta["val"].shape[-2:] == (4, WIDTH)]
    assert len(symbolic) == _stored(sites, traffic.recompute_interval(sites, 4) if recompute == "auto" else recompute)
    assert all(isinstance(size, torch.SymInt) for node in symbolic for size in node.meta["val"].shape[:2])
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    torch._dynamo.reset()
    model.zero_grad()
    options = {**options, "recompute": "none"}
    fixed = torch.compile(model, backend="mhc", options=options, dynamic=False)(tokens)
    fixed.square().sum().backward()
    assert _equal((out, wanted), (fixed, [parameter.grad for parameter in model.parameters()]))


def test_a_policy_that_a_node_has_stays(monkeypatch, pre_norm):
    graphs = []

    def spy(graph_module, config):
        graphs.append(graph_module)
        return annotate_recompute(graph_module, config)

    monkeypatch.setattr(backend, "annotate_recompute", spy)
    _recorded(pre_norm, recompute="none")
    (graph_module,) = graphs

    def policies(annotated):
        return {node.name: node.meta[POLICY] for node in annotated.graph.nodes if POLICY in node.meta}

    assert not policies(graph_module)
    every = annotate_recompute(graph_module, MHCConfig(recompute=1))
    assert not policies(graph_module)
    third = annotate_recompute(graph_module, MHCConfig(recompute=3))
    assert policies(annotate_recompute(every, MHCConfig(recompute=3))) == policies(every) != policies(third)


def test_parameters_stay_static_inputs(pre_norm):
    """CUDA graphs copy every input that is not static, at every call."""
    recorder = Recorder()
    _step(pre_norm, "mhc", options={"inner": recorder.name})
    inputs = [node for node in recorder.last.forward.graph.nodes if node.op == "placeholder"]
    activations = [index for index in range(len(inputs)) if index not in recorder.last.static]
    assert [tuple(inputs[index].meta["val"].shape) for index in activations] == [(TOKENS, WIDTH)]
