"""One compilation serves other batch sizes and lengths, in every fusion choice, and no pass guards on a size."""

import copy

import pytest
import torch
from mhc_compile.kernels.costs.fusion_choice import FusionChoice, FusionReason
from torch._dynamo import mark_dynamic

import mhc_compile
from mhc_compile.planning import chain_sizes

from .models import QUICK, Stack, assert_same_function, llama, token_ids

SIZES = ((2, 8), (3, 8), (5, 13))


def losses(model, compiled, batches, prepare):
    """Run a compiled model on several sizes, the dimensions of the first batch marked; return losses and gradients."""
    found = []
    for index, batch in enumerate(batches):
        if index == 0:
            for dim in (0, 1):
                mark_dynamic(batch, dim)
        model.zero_grad()
        loss = prepare(compiled, batch)
        loss.backward()
        own = [parameter for name, parameter in model.named_parameters() if ".mhc." not in name]
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in own)])
    return found


def language(compiled, ids):
    return compiled(input_ids=ids).logits.square().mean()


def regression(compiled, features):
    return compiled(features).square().mean()


def llama_batches():
    return llama(), language, [token_ids(*size) for size in SIZES]


def stack_batches():
    return Stack(), regression, [torch.randn(*size, 32) for size in SIZES]


@pytest.mark.parametrize(
    ("build", "fusion"),
    [(llama_batches, "auto"), (stack_batches, "auto"), (stack_batches, "site"), (stack_batches, "boundary")],
)
def test_one_compilation_serves_every_size(build, fusion):
    model, run, batches = build()
    reference = copy.deepcopy(model)
    plain = losses(reference, reference, [batch.clone() for batch in batches], run)
    mhc_compile.attach(model, **example(model, batches[0]))
    compiled = torch.compile(model, backend="mhc", options={**QUICK, "fusion": fusion})
    with torch._dynamo.config.patch(error_on_recompile=True):
        rewritten = losses(model, compiled, batches, run)
    for left, right in zip(plain, rewritten, strict=True):
        assert_same_function(left, right, 1e-4, floor=1e-3)
    graphs = [graph for graph in mhc_compile.report(model).graphs if graph.fusion is not None]
    assert len(graphs) == 1
    shown = graphs[0].chains[0].sites[0].shape
    assert [type(size) for size in shown[:2]] == [str, str]


def example(model, batch):
    return {"input_ids": batch} if batch.dtype == torch.int64 else {"features": batch}


def test_auto_sees_the_traced_size_and_does_not_guard_on_it(monkeypatch):
    asked = []

    def choose(tokens, width, n_streams, dtype, device, **more):
        asked.append((tokens, width, n_streams, dtype, more))
        return FusionChoice("boundary", FusionReason.PREDICTED, "a test")

    monkeypatch.setattr(chain_sizes, "choose_fusion", choose)
    model, run, batches = stack_batches()
    mhc_compile.attach(model, features=batches[0])
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses(model, compiled, batches, run)
    assert asked == [(2 * 8, 32, 4, torch.float32, {"manifold": "sinkhorn", "training": True})]
    report = mhc_compile.report(model)
    assert "fusion: boundary, the faster one in the cost model; not measured (a test)" in str(report)
    assert report.to_dict()["graphs"][-1]["fusion"] == {
        "fusion": "boundary", "reason": "the faster one in the cost model; not measured", "detail": "a test"
    }  # fmt: skip


def test_a_graph_takes_what_suits_its_largest_chain(monkeypatch):
    asked = []

    def choose(tokens, *others, **more):
        asked.append(tokens)
        return FusionChoice("site", FusionReason.PREDICTED)

    monkeypatch.setattr(chain_sizes, "choose_fusion", choose)

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.short, self.long = Stack(depth=1), Stack(depth=3)

        def forward(self, few, many):
            return self.short(few).sum() + self.long(many).sum()

    compiled = torch.compile(Two(), backend="mhc", options=QUICK)
    with pytest.warns(mhc_compile.MHCWarning):
        compiled(torch.randn(2, 32), torch.randn(5, 7, 32))
    assert asked == [35]


def test_the_report_says_what_was_asked_for_and_what_a_cpu_runs(tmp_path):
    for option, said in (
        ({}, "fusion: site, C++ compiled for this CPU runs the operators"),
        ({"fusion": "boundary"}, "fusion: boundary, asked for"),
    ):
        model = Stack()
        mhc_compile.attach(model, torch.randn(2, 32))
        torch.compile(model, backend="mhc", options={**QUICK, **option})(torch.randn(2, 32))
        report = mhc_compile.report(model)
        assert said in str(report)
        assert said.removeprefix("fusion: ") in report.to_html(tmp_path / "page.html").read_text()
