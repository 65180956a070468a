"""`on_graph_break="collapse"`: a cut stream is averaged and expanded again: the same function at first, reported."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from mhc_compile.passes.residual import Reason

import mhc_compile
from mhc_compile import MHCConfig, MHCWarning, StreamCutError, UnrewrittenCallError

from ..models import QUICK, BreaksBetween, BreaksInLoop, Stack, assert_same_function, features

COLLAPSE = {**QUICK, "on_graph_break": "collapse"}


class DataDependent(Stack):
    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        if hidden.sum() > 1e9:
            hidden = hidden * 1.5
        return self.readout(self.blocks[1](hidden))


class BreaksInBranch(Stack):
    """The break lies between the second block's last branch and its add."""

    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        hidden = hidden + self.blocks[1].mixer(hidden)
        update = self.blocks[1].mlp(hidden)
        torch._dynamo.graph_break()
        return self.readout(hidden + torch.tanh(update))


def _step(model, call):
    out = call(features())
    out.square().sum().backward()
    ours = {id(parameter) for parameter in mhc_compile.parameters(model).values()}
    grads = [p.grad.clone() for p in model.parameters() if id(p) not in ours and p.grad is not None]
    model.zero_grad()
    return out.detach(), grads


def _assert_preserved(model, plain, options=COLLAPSE):
    out, grads = _step(model, torch.compile(model, backend="mhc", options=options))
    assert_same_function([plain[0]], [out], 1e-5)
    assert_same_function(plain[1], grads, 1e-3)


ALL = [f"blocks.{block}.mhc.{branch}" for block in (0, 1) for branch in ("mixer", "mlp")]


@pytest.mark.parametrize(
    ("broken", "names", "cause"),
    [
        (DataDependent, ALL, "if hidden.sum() > 1e9"),
        (BreaksBetween, ALL, "graph_break()"),
        (BreaksInLoop, ALL, "graph_break()"),
        (BreaksInBranch, [*ALL[:2], "mhc.blocks_1_mixer"], None),
    ],
)
@pytest.mark.parametrize("readout", ["mean", "learned"])
def test_preserved_and_reported(broken, names, cause, readout):
    model = broken()
    plain = _step(model, model)
    report = mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="collapse", readout=readout))
    assert [site.name for site in report.sites] == names
    if cause is None:
        # The last block is cut in half: its add can no longer be told from any other sum, and stays plain.
        assert report.cuts == ()
        cut = [entry for entry in report.rejected if entry.reason is Reason.CUT]
        assert ["tanh(update)" in entry.location and "graph_break()" in entry.detail for entry in cut] == [True]
    else:
        (reason,) = report.cuts
        assert cause in reason
        assert Path(inspect.getfile(broken)).name in reason
        # The table folds long lines.
        text = "".join(str(report).split())
        assert "".join(reason.split()) in text
        assert "anothermodel" in text
    _assert_preserved(model, plain)
    # The mean at the cut, the readout at the end: behind the last cut there is one, before it there is none.
    readouts = [name for name in mhc_compile.parameters(model) if name.endswith("_readout.phi")]
    assert len(readouts) == (readout == "learned")


def test_a_cut_stream_is_not_the_uncut_one():
    """Trained, the two are different models; that is what the report warns of."""
    results = []
    for on_graph_break in ("error", "collapse"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Stack() if on_graph_break == "error" else BreaksBetween()
        mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break=on_graph_break))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in mhc_compile.parameters(model).values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        results.append(torch.compile(model, backend="mhc", options=QUICK)(features()))
    assert not torch.allclose(*results, atol=1e-3)


def test_the_first_call_attaches_every_piece():
    model = BreaksBetween()
    plain = _step(model, model)
    with pytest.warns(MHCWarning, match="first call"):
        _assert_preserved(model, plain)
    report = mhc_compile.report(model)
    assert [site.name for site in report.sites] == ALL
    assert len(report.cuts) == 1
    # Attached, the option comes with the parameters.
    torch._dynamo.reset()
    _assert_preserved(model, plain, QUICK)


@pytest.mark.parametrize("broken", [DataDependent, BreaksBetween, BreaksInLoop])
def test_an_error_names_the_break_and_the_way_out(broken):
    model = broken()
    file = re.escape(Path(inspect.getfile(broken)).name)
    with pytest.raises(StreamCutError, match=rf"{file}:\d+.*on_graph_break='collapse'"):
        mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="error"))
    assert not mhc_compile.parameters(model)


def test_pieces_of_one_site():
    """`min_sites` counts within a piece, unless its parameters say that the chain is longer."""

    class OneEach(Stack):
        breaks = True

        def forward(self, values):
            hidden = self.stem(values)
            hidden = hidden + self.blocks[0].mixer(hidden)
            if self.breaks:
                torch._dynamo.graph_break()
            return self.readout(hidden + self.blocks[1].mixer(hidden))

    model = OneEach()
    plain = _step(model, model)
    with pytest.raises(mhc_compile.NoResidualError, match="min_sites=1"):
        mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="collapse"))
    torch._dynamo.reset()
    model.breaks = False
    mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="collapse"))
    model.breaks = True
    _assert_preserved(model, plain)
    assert [len(chain.sites) for chain in mhc_compile.report(model).chains] == [1, 1]


def test_a_shared_block_counts_on_behind_the_cut():
    class Shared(Stack):
        def forward(self, values):
            hidden = self.blocks[0](self.blocks[0](self.stem(values)))
            torch._dynamo.graph_break()
            return self.readout(self.blocks[0](hidden))

    model = Shared()
    plain = _step(model, model)
    report = mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="collapse"))
    wanted = [f"blocks.0.mhc.{branch}{call}" for call in ("", "_1", "_2") for branch in ("mixer", "mlp")]
    assert [site.name for site in report.sites] == wanted
    _assert_preserved(model, plain)
    # Compiled again, for other shapes: the piece behind the cut still takes the third call's parameters.
    torch.compile(model, backend="mhc", options=QUICK)(features(3))
    assert [site.name for site in mhc_compile.report(model).sites] == wanted


def test_not_strict_leaves_what_is_behind_the_cut_plain():
    model = BreaksBetween()
    plain = _step(model, model)
    config = MHCConfig(strict=False, on_graph_break="error")
    with pytest.warns(MHCWarning, match=r"2 residual adds stay plain.*models\.py"):
        report = mhc_compile.attach(model, features(), config=config)
    assert [site.name for site in report.sites] == ALL[:2]
    assert [entry.reason for entry in report.rejected if entry.reason is Reason.CUT] == [Reason.CUT] * 2
    with pytest.warns(MHCWarning, match="stay plain"):
        _assert_preserved(model, plain, {**QUICK, "strict": False})


def test_a_cut_through_attached_sites_is_an_error_even_if_not_strict():
    model = BreaksBetween()
    mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="collapse"))
    compiled = torch.compile(model, backend="mhc", options={**QUICK, "strict": False, "on_graph_break": "error"})
    with pytest.raises(StreamCutError, match="collapse"):
        compiled(features())


@pytest.mark.parametrize("broken", [DataDependent, BreaksInLoop])
def test_the_promise_holds_for_every_piece(broken):
    model = broken()
    mhc_compile.attach(model, features(), config=MHCConfig(on_graph_break="collapse"))
    with pytest.raises(UnrewrittenCallError):
        model(features())
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnrewrittenCallError):
        torch.compile(model, backend="mhc", options=QUICK)(features())
