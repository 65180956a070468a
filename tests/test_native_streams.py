"""Models that carry streams already: found by dataflow, proved, run by the operators, exact with perturbed weights."""

import copy
from collections import Counter
from unittest import mock

import pytest
import torch
from mhc_compile.kernels import ops
from torch import nn

import mhc_compile
from mhc_compile import MHCConfig, NoResidualError, functional

from .counting import Counting
from .native_models import HandWritten, Mixer, deepseek_v4, glm5_next, hy_v4, perturb
from .perturbed import gaps, outputs_and_gradients

EAGER = {"inner": "eager"}
IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
CALL = {"input_ids": IDS, "use_cache": False}
TOKENS = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


def _compared(model, args=(), kwargs=None, plain=None, floor=1e-4, **options):
    """Return how far the compiled model is from the plain one: outputs, gradients and the worst gradient's name."""
    torch._dynamo.reset()
    plain = plain or model
    wanted = outputs_and_gradients(plain, dict(plain.named_parameters()), args, kwargs or {})
    compiled = torch.compile(model, backend="mhc", options={**EAGER, **options})
    got = outputs_and_gradients(compiled, dict(model.named_parameters()), args, kwargs or {})
    return gaps(wanted, got, floor)


def _native(model, kind="site"):
    return [row for row in mhc_compile.report(model).native if row.kind == kind]


@pytest.mark.parametrize(
    ("build", "mathematics", "heads"),
    [
        (deepseek_v4, "sinkhorn, 20 iterations, rows last, stored [in, out], eps 1e-06, norm eps 1e-06", 1),
        (glm5_next, "sinkhorn, 20 iterations, rows last, stored [in, out], eps 1e-06, norm eps 1e-05", 0),
        (hy_v4, "identity, eps 1e-06, norm eps 1e-05, post 2·sigmoid + 1e-06", 1),
    ],
)
def test_a_model_of_transformers_is_exact_and_keeps_its_parameters(build, mathematics, heads):
    model = perturb(build(layers=1))
    names = list(model.state_dict())
    # Compared by a floor: the gradient of one number is a sum that cancels, and float32 leaves 7 digits of its terms.
    out, gradient, where = _compared(model, kwargs=CALL, floor=1e-3, fusion="boundary")
    assert out <= 1e-5
    assert gradient <= 1e-4, where
    assert list(model.state_dict()) == names
    sites = _native(model)
    assert len(sites) == 2
    assert {site.mathematics for site in sites} == {mathematics}
    assert sites[0].name.endswith("layers.0.attn_hc")
    assert len(_native(model, "head")) == heads
    assert not mhc_compile.report(model).sites


def test_in_float64_nothing_but_rounding_is_left():
    """Hy-V4 casts to float32 by hand: here these casts go to float64."""
    model = perturb(hy_v4(layers=1)).double()
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        out, gradient, where = _compared(model, kwargs=CALL, fusion="boundary", strict=False)
    assert len(_native(model)) == 2
    assert out <= 1e-12
    assert gradient <= 1e-10, where


@pytest.mark.parametrize("build", [deepseek_v4, glm5_next, hy_v4])
def test_bfloat16_is_as_near_to_float32_as_the_plain_model(build):
    model = perturb(build(layers=1)).bfloat16()
    exact = copy.deepcopy(model).float()
    wanted = outputs_and_gradients(exact, dict(exact.named_parameters()), (), CALL)
    plain = outputs_and_gradients(model, dict(model.named_parameters()), (), CALL)
    compiled = torch.compile(model, backend="mhc", options=EAGER)
    ours = outputs_and_gradients(compiled, dict(model.named_parameters()), (), CALL)
    assert len(_native(model)) == 2

    def distance(found):
        pairs = [(found[0], wanted[0]), ([found[1][n] for n in wanted[1]], list(wanted[1].values()))]
        return [_distance(torch.cat([t.flatten() for t in a]), torch.cat([t.flatten() for t in b])) for a, b in pairs]

    for got, theirs in zip(distance(ours), distance(plain), strict=True):
        assert got <= 1.3 * theirs


def _distance(left, right):
    return float((left - right).norm() / right.norm())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("last", [-1, -2])
def test_another_spelling_is_exact_in_every_orientation(last, transposed):
    torch.manual_seed(0)
    model = perturb(HandWritten(last=last, transposed=transposed), 0.3).double()
    out, gradient, where = _compared(model, (TOKENS.double(),))
    assert out <= 1e-12
    assert gradient <= 1e-10, where
    (mathematics,) = {site.mathematics for site in _native(model)}
    assert f"{'rows' if (last == -1) != transposed else 'columns'} last" in mathematics
    assert f"stored {'[in, out]' if transposed else '[out, in]'}" in mathematics


def test_a_model_with_both_kinds_of_stream_gets_both():
    torch.manual_seed(0)
    model = perturb(HandWritten(plain=2), 0.3)
    wide, args = copy.deepcopy(model).double(), (TOKENS.double(),)
    wanted = outputs_and_gradients(wide, dict(wide.named_parameters()), args, {})
    parameters = dict(model.named_parameters())
    report = mhc_compile.attach(model, TOKENS, config=MHCConfig(n_streams=3))
    assert len(report.sites) == 2
    assert len(report.native) == 2
    compiled = torch.compile(model, backend="mhc", options={"inner": "aot_eager", "fusion": "boundary", "recompute": 1})
    got = outputs_and_gradients(compiled, parameters, (TOKENS,), {})
    out, gradient, where = gaps(wanted, got, 1e-3)
    assert out <= 1e-5
    assert gradient <= 1e-4, where
    assert len(mhc_compile.report(model).native) == len(mhc_compile.report(model).sites) == 2


class _Packed(Mixer):
    """All weights in one tensor [n·C, rows]."""

    def __init__(self, width, **more):
        super().__init__(width, **more)
        del self.gain, self.to_pre, self.to_post, self.to_res
        self.weight = nn.Parameter(torch.randn(self.n * width, 24) * 0.1)

    def forward(self, x):
        normed = nn.functional.rms_norm(x.flatten(-2), (x.shape[-2] * x.shape[-1],), eps=1e-5)
        pre, post, res = (normed @ self.weight).split([4, 4, 16], dim=-1)
        logits = self.alphas[2] * res.unflatten(-1, (4, 4)) + self.res
        for _ in range(self.iters):
            logits = logits.log_softmax(-3 - self.last).log_softmax(self.last)
        read = (self.alphas[0] * pre + self.pre).sigmoid()
        return (read.unsqueeze(-1) * x).sum(-2), self.gate(self.alphas[1] * post + self.post), logits.exp()


@pytest.mark.parametrize("transposed", [False, True])
def test_weights_are_taken_as_they_lie_and_their_gradients_come_so(transposed):
    torch.manual_seed(0)
    model = perturb(HandWritten(layers=3, mixer=_Packed, transposed=transposed), 0.3)
    wide, args = copy.deepcopy(model).double(), (TOKENS.double(),)
    wanted = outputs_and_gradients(wide, dict(wide.named_parameters()), args, {})
    counting = Counting()
    options = {"inner": counting.name, "fusion": "boundary"}
    compiled = torch.compile(model, backend="mhc", options=options)
    got = outputs_and_gradients(compiled, dict(model.named_parameters()), (TOKENS,), {})
    assert len(_native(model)) == 3
    out, gradient, where = gaps(wanted, got, 1e-3)
    assert out <= 1e-5
    assert gradient <= 1e-4, where
    weight = model.mixers[0].weight
    views = {"aten::t", "aten::transpose", "aten::permute", "aten::view", "aten::alias", "aten::detach"}
    made = [
        node
        for graph_module in (*counting.forward, *counting.backward)
        for node in graph_module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.name not in views
        and getattr(node.meta["val"], "shape", torch.Size()).numel() == weight.numel()
    ]
    assert made == []
    assert weight.grad.stride() == weight.stride()


class _Other(Mixer):
    """post = 2·tanh² of its logits."""

    def gate(self, logits):
        return 2.0 * logits.tanh().square()


def test_other_mathematics_stay_and_the_report_says_by_how_much():
    torch.manual_seed(0)
    model = perturb(HandWritten(mixer=_Other), 0.3)
    with pytest.raises(NoResidualError, match="and not as the operators do"):
        torch.compile(model, backend="mhc", options=EAGER)(TOKENS)
    report = mhc_compile.explain(model, TOKENS)
    assert not report.native
    details = [entry.detail for entry in report.rejected if "not as the operators do" in entry.reason.value]
    assert len(details) == 2
    assert all(detail.startswith("post differs by ") and float(detail.split()[-1]) > 1e-3 for detail in details)
    assert details[0] in " ".join(str(report).replace("│", " ").split())


def test_a_difference_of_a_millionth_is_a_difference():
    """A mixer that adds an eps of its own to each sum of Sinkhorn, and none elsewhere, is not what the operators do."""

    class Near(Mixer):
        def forward(self, x):
            read, write, res = super().forward(x)
            return read, write, res / (res.sum(-1, keepdim=True) + 1e-6)

    report = mhc_compile.explain(perturb(HandWritten(mixer=Near), 0.3), TOKENS)
    assert not report.native
    details = [entry.detail for entry in report.rejected if "not as the operators do" in entry.reason.value]
    assert details
    assert all(detail.startswith("res") for detail in details)


class _Called(nn.Module):
    """Written with the functions of this package."""

    def __init__(self):
        super().__init__()
        self.phi, self.scale = nn.Parameter(torch.randn(24, 48) * 0.1), nn.Parameter(torch.ones(3))
        self.bias, self.branch = nn.Parameter(torch.zeros(24)), nn.Linear(12, 12)

    def forward(self, x):
        streams = torch.stack([x] * 4, -2)
        for _ in range(2):
            read, post, res = functional.pre(streams, self.phi, self.scale, self.bias)
            streams = functional.post(streams, self.branch(read), post, res)
        return streams.mean(-2)


def test_a_model_written_with_our_functions_counts_as_found():
    model = _Called()
    out, gradient, _ = _compared(model, (TOKENS,))
    assert max(out, gradient) <= 1e-6
    assert len(_native(model, "call")) >= 1


def test_switched_off_the_model_stays_as_it_is():
    model = perturb(HandWritten(), 0.3)
    out, gradient, _ = _compared(model, (TOKENS,), disable_passes="lower_native", strict=False)
    assert max(out, gradient) == 0.0
    assert not _native(model)


def test_checkpointed_layers_run_the_operators():
    torch.manual_seed(0)
    model = perturb(HandWritten(checkpointed=True), 0.3).double()
    out, gradient, where = _compared(model, (TOKENS.double(),), inner="aot_eager", fusion="boundary")
    assert out <= 1e-12
    assert gradient <= 1e-10, where
    assert len(_native(model)) == 2


def test_generation_with_a_cache_is_that_of_the_plain_model():
    model = perturb(hy_v4(layers=1)).eval()
    wanted = model.generate(IDS, max_new_tokens=2, do_sample=False)
    model.compile(backend="mhc", options=EAGER)
    assert torch.equal(model.generate(IDS, max_new_tokens=2, do_sample=False), wanted)
    assert len(_native(model)) == 2


@pytest.mark.parametrize("transposed", [False, True])
def test_a_site_that_a_graph_break_halves_runs_the_operators_in_both_graphs(transposed, monkeypatch):
    called = Counter()

    def counting(name, *arguments, **keywords):
        called[name] += 1
        return run(name, *arguments, **keywords)

    run = ops.run
    monkeypatch.setattr(ops, "run", counting)

    class Breaking(nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    torch.manual_seed(0)
    model = perturb(HandWritten(layers=2, transposed=transposed), 0.3)
    model.branches[1][1] = perturb(Breaking(12, 12), 0.3)
    model.double()
    out, gradient, where = _compared(model, (TOKENS.double(),))
    assert out <= 1e-12
    assert gradient <= 1e-10, where
    assert [site.name for site in _native(model)] == ["mixers.0", "mixers.1"]
    assert "written in another graph" in _native(model)[1].mathematics
    assert called["measure"] == called["collapse"] == called["post"] == 2


def test_any_number_of_tokens_runs_in_one_graph():
    model = perturb(HandWritten(), 0.3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mhc", options=EAGER, dynamic=True)
    for batch, length in ((2, 5), (3, 7), (4, 9)):
        x = torch.randn(batch, length, 12)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(mhc_compile.report(model).graphs) == 1
    assert len(_native(model)) == 2


def test_the_meta_device_is_enough_to_explain():
    with torch.device("meta"):
        model, x = HandWritten(), torch.empty(2, 5, 12)
    assert len([row for row in mhc_compile.explain(model, x).native if row.kind == "site"]) == 2


def test_gated_streams_without_a_mixing_matrix_are_named():
    """Qwen4-exp weighs each feature of each stream by a low-rank gate: not what the operators compute."""
    from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextConfig, Qwen4ExpTextGatedResidual

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            config = Qwen4ExpTextConfig(hidden_size=12, hc_count=4, hc_lowrank=8)
            self.gates = nn.ModuleList(Qwen4ExpTextGatedResidual(config) for _ in range(2))
            self.branches = nn.ModuleList(HandWritten.branch(12) for _ in range(2))

        def forward(self, x):
            x = x.repeat(1, 1, 4)
            for gate, branch in zip(self.gates, self.branches, strict=True):
                read, kept, write = gate(x)
                x = kept + (branch(read).unsqueeze(-2) * write.unsqueeze(-1)).flatten(-2)
            return x

    report = mhc_compile.explain(Layers(), TOKENS)
    assert not report.native
    assert not report.sites
    reasons = [entry.reason.value for entry in report.rejected]
    assert sum("streams that the model carries itself" in reason for reason in reasons) == 2


def test_boundaries_are_joined_and_streams_replayed():
    model = perturb(HandWritten(layers=4, width=12), 0.3)
    torch._dynamo.reset()
    counting = Counting()
    options = {"inner": counting.name, "fusion": "boundary", "recompute": 2}
    torch.compile(model, backend="mhc", options=options)(TOKENS).sum().backward()
    assert counting.counts("forward")["mhc.post_pre.default"] >= 1
    streams = [shape for shape in counting.kept() if shape == (2, 5, 4, 12)]
    assert len(streams) == 1
