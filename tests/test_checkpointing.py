"""The stream crosses checkpointed bodies, and what the user asked to have recomputed is recomputed."""

import functools

import pytest
import torch
from mhc_compile.passes.residual import Reason
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import mhc_compile
from mhc_compile import MHCConfig, MHCWarning, StreamCutError

from .counting import Counting
from .models import CASES, QUICK, WIDTH, Block, Stack, assert_same_function, features, llama, token_ids


def _without_dropout(model):
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def _step(model, call):
    torch.manual_seed(7)
    out = call()
    out = out if isinstance(out, torch.Tensor) else out[0]
    out.square().sum().backward()
    ours = {id(parameter) for parameter in mhc_compile.parameters(model).values()}
    grads = [p.grad.clone() for p in model.parameters() if id(p) not in ours and p.grad is not None]
    model.zero_grad()
    return out.detach(), grads


def _assert_same_step(model, plain, rewritten):
    assert_same_function([plain[0]], [rewritten[0]], 1e-5)
    floor = 1e-3 * max(float(grad.abs().max()) for grad in plain[1])
    assert_same_function(plain[1], rewritten[1], 1e-3, floor=floor)


@pytest.mark.parametrize(
    ("name", "reentrant"),
    [("llama", True), ("bert", False), ("vit", False)],
)
def test_hugging_face_models(name, reentrant):
    case = CASES[name]()
    model, inputs = _without_dropout(case.build()), case.inputs()
    without = [site.name for site in mhc_compile.explain(model, **inputs).sites]
    torch._dynamo.reset()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    plain = _step(model, lambda: model(**inputs))
    report = mhc_compile.attach(model, **inputs)
    assert [site.name for site in report.sites] == without
    assert len(without) == sum(case.chains)
    _assert_same_step(model, plain, _step(model, lambda: torch.compile(model, backend="mhc", options=QUICK)(**inputs)))


def test_branches_are_recomputed_and_the_streams_are_kept():
    """As in the plain model: the backward runs the bodies' products again, and keeps what crosses their borders.

    The parameters are made without checkpointing, and serve with it.
    """
    counts, steps, kept = {}, {}, {}
    model = llama(attention_dropout=0.3).train()
    model.config.use_cache = False

    def step(checkpointed, rewritten, recompute="none"):
        torch._dynamo.reset()
        (model.gradient_checkpointing_enable if checkpointed else model.gradient_checkpointing_disable)()
        inner = Counting()
        if rewritten:
            options = {"inner": inner.name, "recompute": recompute}
            compiled = torch.compile(model, backend="mhc", options=options)
        else:
            compiled = torch.compile(model, backend=inner.name)
        return _step(model, functools.partial(compiled, token_ids())), inner

    # Without checkpointing, recompute="auto" would replay coefficients too.
    for key in ((True, False), (False, False), (False, True), (True, True)):
        if key == (False, True):
            mhc_compile.attach(model, input_ids=token_ids())
            made = sorted(mhc_compile.parameters(model))
        steps[key], inner = step(*key)
        counts[key], kept[key] = inner.counts("backward"), inner.kept()
    products = {key: count["aten.mm.default"] for key, count in counts.items()}
    # 7 products a layer, two layers. The plain model need not rerun the last, whose output only adds; `post` reads it.
    assert products[True, False] - products[False, False] == 2 * 7 - 1
    assert products[True, True] - products[False, True] == 2 * 7
    assert counts[True, True]["mhc.pre.default"] == 4
    assert counts[False, True]["mhc.pre.default"] == 0
    streams = (*token_ids().shape, 4, WIDTH)
    # The stream between the two bodies; the head is kept before it is expanded.
    assert kept[True, True].count(streams) == 1
    assert kept[False, True].count(streams) > 2
    # Recomputing streams as well reruns no further product, and no site twice.
    steps["both"], inner = step(True, True, "auto")
    assert inner.counts("backward")["aten.mm.default"] == products[True, True]
    assert inner.counts("backward")["mhc.pre.default"] == 4
    assert sorted(mhc_compile.parameters(model)) == made
    # The same masks in the forward and in its rerun, and the same as in the plain model.
    for key in ((True, False), (False, True), (True, True), "both"):
        _assert_same_step(model, steps[False, False], steps[key])


class ByHand(Stack):
    """Calls `checkpoint` itself, around whole blocks or around one branch."""

    def __init__(self, around="block", **options):
        super().__init__()
        self.around, self.options = around, options

    def forward(self, values):
        hidden = self.stem(values)
        for block in self.blocks:
            if self.around == "block":
                hidden = checkpoint(block, hidden, use_reentrant=False, **self.options)
            elif self.around == "branch":
                hidden = hidden + checkpoint(block.mixer, hidden, use_reentrant=False, **self.options)
            elif self.around == "none":
                hidden = block(hidden)
            else:
                two = functools.partial(checkpoint, block, use_reentrant=False)
                hidden = checkpoint(lambda value, inner=two: inner(inner(value)), hidden, use_reentrant=False)
        return self.readout(hidden)


@pytest.mark.parametrize(
    ("around", "sites", "inner"),
    [("block", 4, "aot_eager"), ("branch", 2, "aot_eager"), ("nested", 8, "aot_eager"), ("nested", 8, "eager")],
)
def test_checkpoint_by_hand(around, sites, inner):
    model = ByHand(around)
    plain = _step(model, lambda: model(features()))
    assert len(mhc_compile.attach(model, features()).sites) == sites
    compiled = torch.compile(model, backend="mhc", options={"inner": inner})
    _assert_same_step(model, plain, _step(model, lambda: compiled(features())))


@pytest.fixture(scope="module")
def without_checkpoints():
    """A model with mHC parameters far from the start, and what it computes without checkpoints."""
    torch.manual_seed(0)
    model = ByHand("none")
    mhc_compile.attach(model, features(), config=MHCConfig(init="paper", sinkhorn_iters=2))
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    return model, _step(model, lambda: compiled(features()))


@pytest.mark.parametrize("fusion", ["site", "boundary", "inductor"])
def test_every_fusion_choice_in_checkpointed_bodies(without_checkpoints, fusion):
    model, wanted = without_checkpoints
    torch._dynamo.reset()
    inner = Counting()
    model.around = "block"
    compiled = torch.compile(model, backend="mhc", options={"inner": inner.name, "fusion": fusion})
    _assert_same_step(model, wanted, _step(model, lambda: compiled(features())))
    if fusion == "boundary":
        # Within a body only: across its border one half would be recomputed without the other.
        assert inner.counts("forward")["mhc.post_pre.default"] == 2


def _keep_products(context, function, *args, **kwargs):
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if function in kept else CheckpointPolicy.PREFER_RECOMPUTE


def _keep_products_contexts():
    return create_selective_checkpoint_contexts(_keep_products)


def test_selective_checkpointing_keeps_what_its_policy_keeps():
    counts = {}
    for label, options in (("all", {}), ("selective", {"context_fn": _keep_products_contexts})):
        torch._dynamo.reset()
        model = ByHand(**options)
        plain = _step(model, lambda model=model: model(features()))
        assert len(mhc_compile.attach(model, features()).sites) == 4
        inner = Counting()
        compiled = torch.compile(model, backend="mhc", options={"inner": inner.name})
        _assert_same_step(model, plain, _step(model, functools.partial(compiled, features())))
        counts[label] = inner.counts("backward")
    # The policy keeps the products, so none is run again; the operators it does not name are.
    assert counts["all"]["aten.addmm.default"] == 4
    assert counts["selective"]["aten.addmm.default"] == 0
    assert counts["selective"]["mhc.pre.default"] == counts["all"]["mhc.pre.default"] == 4


def test_a_dropped_mask_is_drawn_again_alike():
    class Dropping(ByHand):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(dropout=0.4) for _ in range(2))

    steps = []
    for rewritten in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Dropping()
        backend = {"backend": "aot_eager"}
        if rewritten:
            mhc_compile.attach(model, features())
            backend = {"backend": "mhc", "options": QUICK}
        steps.append(_step(model, functools.partial(torch.compile(model, **backend), features())))
    _assert_same_step(model, *steps)


@pytest.mark.parametrize("options", [{}, {"on_graph_break": "collapse"}])
def test_t5_cuts_its_own_stream_under_checkpointing(options):
    """Its first block sets `requires_grad` on a tensor inside a branch, where Dynamo breaks."""
    case = CASES["t5"]()
    model, inputs = _without_dropout(case.build()), case.inputs()
    model.gradient_checkpointing_enable()
    plain = _step(model, lambda: model(**inputs))
    config = MHCConfig(inner="aot_eager", min_sites=1, **options)
    if not options:
        with pytest.raises(StreamCutError, match=r"modeling_t5\.py:\d+  position_bias\.requires_grad"):
            mhc_compile.attach(model, config=config, **inputs)
        return
    with pytest.warns(MHCWarning, match="requires_grad"):
        report = mhc_compile.attach(model, config=config, **inputs)
    assert 0 < len(report.sites) < sum(case.chains)
    assert not any(entry.reason is Reason.CUT for entry in report.rejected)
    assert any("requires_grad" in reason for reason in report.cuts)
    compiled = torch.compile(model, backend="mhc", options={"inner": "aot_eager", **options})
    _assert_same_step(model, plain, _step(model, lambda: compiled(**inputs)))
