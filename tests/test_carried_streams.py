"""A stream is one stream, however many graphs it crosses: compared with one graph, under perturbed parameters."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import mhc_compile
from mhc_compile import StreamCutError, UnrewrittenCallError
from mhc_compile.carried_streams import STREAMS

from .carrying import (
    BLOCKWISE,
    REFERENCE,
    Looped,
    compile_blocks,
    gradients,
    outcome,
    perturb,
    run,
    same,
    stack,
    twins,
    wanted,
)
from .models import QUICK, Stack, features


@pytest.mark.parametrize("name", BLOCKWISE)
def test_blocks_compiled_alone_are_the_model_of_one_graph(name):
    case = BLOCKWISE[name]()
    whole, pieces = twins(case.build().eval(), **case.inputs())
    want = outcome(whole, torch.compile(whole, backend="mhc", options=REFERENCE), case.inputs())
    compile_blocks(pieces, backend="mhc", options=QUICK)
    same(want, outcome(pieces, pieces, case.inputs()))


def test_blocks_compiled_by_inductor():
    want, pieces = wanted(4)
    compile_blocks(pieces, backend="mhc", fullgraph=True)
    same(want, run(pieces, pieces))


@pytest.mark.parametrize("blocks", [2, 12])
def test_equal_blocks_compile_three_graphs_at_most(blocks):
    want, pieces = wanted(blocks)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(pieces, backend="mhc", options=QUICK, fullgraph=True)
    same(want, run(pieces, pieces))
    assert counters["stats"]["unique_graphs"] == min(blocks, 3)
    another = stack(blocks)
    compile_blocks(another, backend="mhc", options=QUICK, fullgraph=True)
    same(want, run(another, another))
    assert counters["stats"]["unique_graphs"] == min(blocks, 3), "a second instance compiles nothing"


def test_a_print_between_blocks(capsys):
    want, pieces = wanted(3, Looped)
    pieces.between = lambda hidden, index: (print(float(hidden.mean())), hidden)[1]
    same(want, run(pieces, torch.compile(pieces, backend="mhc", options=QUICK)))
    assert capsys.readouterr().out.count("\n") == 3


class Unrolled(nn.Module):
    """Breaks its graph between two sites of one forward, no loop around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.readout = nn.Linear(16, 16), nn.Linear(16, 4)
        self.first, self.second, self.third = (nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(3))
        self.breaks = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        hidden = hidden + self.first(hidden)
        if self.breaks:
            torch._dynamo.graph_break()
        hidden = hidden + self.second(hidden)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.readout(hidden + self.third(hidden))


def test_resumed_frames_go_on_with_the_stream():
    torch.manual_seed(0)
    whole, pieces = twins(Unrolled(), torch.randn(2, 5, 16))
    inputs = torch.randn(2, 5, 16)
    want = run(whole, torch.compile(whole, backend="mhc", options=REFERENCE), inputs)
    pieces.breaks = True
    same(want, run(pieces, torch.compile(pieces, backend="mhc", options=QUICK), inputs))


def test_attach_sees_the_roles_through_graph_breaks():
    def attached(breaks: bool) -> nn.Module:
        torch.manual_seed(0)
        model = Unrolled()
        model.breaks = breaks
        mhc_compile.attach(model, torch.randn(2, 5, 16))
        return model

    whole, broken = attached(False), attached(True)
    assert [site.role for site in whole.mhc.children()] == ["head", "carried", "tail"]
    assert [site.role for site in broken.mhc.children()] == ["head", "carried", "tail"]
    for name, parameter in whole.state_dict().items():
        assert torch.equal(parameter, broken.state_dict()[name]), name


class BrokenBranch(Unrolled):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(inputs)
        hidden = hidden + self.first(hidden)
        branch = self.second(hidden)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.readout(hidden + branch)


def test_a_break_inside_a_branch_names_its_place():
    model = BrokenBranch()
    mhc_compile.attach(model, torch.randn(2, 5, 16))
    model.breaks = True
    with pytest.raises((StreamCutError, UnrewrittenCallError), match=r"test_carried_streams\.py:\d+"):
        torch.compile(model, backend="mhc", options=QUICK)(torch.randn(2, 5, 16))


class Passing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


ANEW = {
    "scaled": lambda hidden, index: hidden * 2.0,
    "cloned": lambda hidden, index: hidden.clone(),
    "in place": lambda hidden, index: hidden.mul_(2.0) if index else hidden,
    "an autograd function": lambda hidden, index: Passing.apply(hidden),
    "transposed": lambda hidden, index: hidden.t().contiguous().t() if index else hidden,
}


@pytest.mark.parametrize("between", ANEW.values(), ids=ANEW.keys())
def test_a_value_computed_anew_between_two_blocks_raises(between):
    model = stack(3, Looped)
    model.between = between
    compile_blocks(model, backend="mhc", options=QUICK)
    with pytest.raises(StreamCutError, match=r"streams are lost before blocks\.1"):
        model(features())


def test_attach_refuses_a_value_computed_anew():
    def between(hidden, index):
        torch._dynamo.graph_break()
        return hidden * 2.0

    with pytest.raises(StreamCutError, match="computes the hidden state anew"):
        mhc_compile.attach(Looped(3, between), features())


def test_what_autograd_cannot_see_is_found_by_the_check():
    def between(hidden, index):
        hidden.data.mul_(1.5)
        return hidden

    model = stack(3, Looped)
    model.between = between
    compile_blocks(model, backend="mhc", options={**QUICK, "check_carried": True})
    with pytest.raises(StreamCutError, match="no longer is the readout"):
        model(features())
    model.between = lambda hidden, index: hidden
    model(features())


def test_never_attached_blocks_inside_a_model_raise():
    model = Stack(3)
    compile_blocks(model, backend="mhc", options=QUICK)
    with pytest.raises(StreamCutError, match="attach"):
        model(features())
    assert not mhc_compile.parameters(model)


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_never_attached_blocks_in_a_loop_of_the_user_raise():
    blocks = Stack(3).blocks
    compiled = [torch.compile(block, backend="mhc", options=QUICK) for block in blocks]
    hidden = compiled[0](features())
    with pytest.raises(StreamCutError, match="on the whole model before the first call"):
        compiled[1](hidden)


@pytest.mark.filterwarnings("ignore::mhc_compile.MHCWarning")
def test_more_blocks_than_the_recompile_limit_are_never_plain():
    blocks = Stack(12).blocks
    hidden = features()
    compiled = nn.Sequential(*(torch.compile(block, backend="mhc", options=QUICK) for block in blocks))
    with pytest.raises(StreamCutError):
        compiled(hidden)


# A mode needs a graph for each of the roles; Dynamo's limit counts them all.
@torch._dynamo.config.patch(recompile_limit=32)
def test_without_gradients_and_in_other_modes():
    whole, pieces = stack(2), stack(2)
    compiled = torch.compile(whole, backend="mhc", options=REFERENCE)
    compile_blocks(pieces, backend="mhc", options=QUICK)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.allclose(compiled(features()), pieces(features()), rtol=1e-6, atol=1e-6)
    same(run(whole, compiled), run(pieces, pieces))
    whole.eval(), pieces.eval()
    same(run(whole, compiled), run(pieces, pieces))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        left, right = run(whole, compiled), run(pieces, pieces)
    assert torch.allclose(left[0].float(), right[0].float(), rtol=1e-2)


def test_dynamic_shapes_compile_no_graph_a_size():
    whole, pieces = stack(3), stack(3)
    compiled = torch.compile(whole, backend="mhc", options=REFERENCE, dynamic=True)
    compile_blocks(pieces, backend="mhc", options=QUICK, dynamic=True)
    for batch in (5, 7, 11):
        same(run(whole, compiled, features(batch)), run(pieces, pieces, features(batch)))


def test_microbatches_retained_graphs_and_accumulation():
    whole, pieces = stack(3), stack(3)
    compiled = torch.compile(whole, backend="mhc", options=REFERENCE)
    compile_blocks(pieces, backend="mhc", options=QUICK)
    inputs = [features() * scale for scale in (1.0, 0.5, 2.0)]
    results = []
    for model, call in ((whole, compiled), (pieces, pieces)):
        model.zero_grad(set_to_none=True)
        losses = [call(part).square().mean() for part in inputs]
        for loss in losses:
            loss.backward(retain_graph=True)
        losses[1].backward()
        results.append((torch.stack(losses).detach(), gradients(model)))
    same(*results)


def test_nothing_is_left_after_twenty_steps():
    # What failed in other tests may still be held, with its values, by their tracebacks.
    gc.collect()
    before = len(STREAMS)
    model = stack(3)
    compile_blocks(model, backend="mhc", options=QUICK)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(20):
        run(model, model)
        optimizer.step()
    gc.collect()
    assert len(STREAMS) == before


def test_a_stage_of_deleted_layers_hands_its_streams_on():
    want, first = wanted(4)
    second = copy.deepcopy(first)
    del first.blocks[2:], second.blocks[:2]
    first.readout, second.stem = nn.Identity(), nn.Identity()
    compile_blocks(first, backend="mhc", options=QUICK)
    compile_blocks(second, backend="mhc", options=QUICK)
    loss = second(first(features())).square().mean()
    loss.backward()
    assert torch.allclose(loss, want[0], rtol=1e-6)
    got = gradients(first)
    assert all(torch.allclose(got[name], want[1][name], rtol=1e-5, atol=1e-9) for name in got)


def test_repeated_calls_of_a_block_compiled_alone_raise():
    class Recurrent(Stack):
        def forward(self, inputs):
            hidden = self.stem(inputs)
            for _ in range(3):
                hidden = self.blocks[0](hidden)
            return self.readout(hidden)

    model = Recurrent(1)
    mhc_compile.attach(model, features())
    assert torch.compile(model, backend="mhc", options=QUICK)(features()).isfinite().all()
    torch._dynamo.reset()
    compile_blocks(model, backend="mhc", options=QUICK)
    with pytest.raises(StreamCutError, match="3 times in a forward"):
        model(features())


@pytest.mark.parametrize("options", [{"sinkhorn_iters": 1}, {"manifold": "none"}])
def test_models_that_differ_in_an_option_alone_share_no_graph(options):
    """Their parameters have the same shapes, so nothing else would tell Dynamo."""

    def attached(**options) -> nn.Module:
        torch.manual_seed(0)
        model = Stack(3)
        mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(**options))
        perturb(model)
        return model

    usual, other = attached(), attached(**options)
    together = [torch.compile(model, backend="mhc", options=REFERENCE)(features()) for model in (usual, other)]
    torch._dynamo.reset()
    alone = torch.compile(other, backend="mhc", options=REFERENCE)(features())
    assert torch.equal(together[1], alone)
    assert not torch.allclose(together[0], alone, atol=1e-3)


@pytest.mark.parametrize("another", [False, True])
def test_what_was_compiled_plain_is_not_used_once_parameters_are_attached(another):
    options = {**QUICK, "strict": False, "min_sites": 100}
    first = Stack(3)
    compiled = torch.compile(first, backend="mhc", options=options)
    compiled(features())
    model = Stack(3) if another else first
    mhc_compile.attach(model, features(), config=mhc_compile.MHCConfig(min_sites=2))
    perturb(model)
    if another:
        compiled = torch.compile(model, backend="mhc", options=options)
    with pytest.raises(mhc_compile.ConfigMismatchError):
        compiled(features())


def test_perturbation_is_seen():
    """The tests above could not fail at the preserving start; here the streams matter."""
    model = stack(3)
    plain = copy.deepcopy(model)
    mhc_compile.detach(plain)
    plain = plain(features())
    moved = torch.compile(model, backend="mhc", options=REFERENCE)(features())
    assert (moved - plain).abs().max() > 1e-2 * plain.abs().max()
