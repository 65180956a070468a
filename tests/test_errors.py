"""Bad input: the error says what to do, and the model is left as it was."""

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import ConfigMismatchError, MHCConfig, MHCOptionError, NoResidualError, StreamCutError
from mhc_compile.dynamo.inner import compile_inner

from .models import QUICK, Block, BreaksBetween, BreaksInLoop, Stack, features


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_streams": 0}, "between 1 and 8"),
        ({"n_streams": 9}, "between 1 and 8"),
        ({"n_streams": 2.0}, "integer"),
        ({"n_streams": True}, "integer"),
        ({"manifold": "sinkhon"}, "Did you mean 'sinkhorn'"),
        ({"sinkhorn_iters": 0}, "at least 1"),
        ({"init": "zero"}, "'preserve', 'paper'"),
        ({"readout": "sum"}, "'mean', 'learned'"),
        ({"fusion": "everything"}, "must be one of"),
        ({"recompute": "all"}, "'auto', 'none', or the number of sites"),
        ({"recompute": "4"}, "number of sites"),
        ({"recompute": 0}, "at least 1"),
        ({"recompute": 2.0}, "integer"),
        ({"recompute": True}, "integer"),
        ({"on_graph_break": "ignore"}, "must be one of"),
        ({"sites": 3}, "glob"),
        ({"min_sites": 0}, "at least 1"),
        ({"strict": 1}, "True or False"),
        ({"inner": None}, "Dynamo backend"),
    ],
)
def test_bad_values(options, words):
    with pytest.raises(MHCOptionError, match=words):
        MHCConfig(**options)


def _unchanged(model, call, error, match):
    keys, plain = list(model.state_dict()), model(features())
    with pytest.raises(error, match=match):
        call()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(features()), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"n_steams": 2}, MHCOptionError, "Did you mean 'n_streams'"),
        ({"n_streams": 0}, MHCOptionError, "between 1 and 8"),
        ({"inner": "inducter"}, MHCOptionError, "no Dynamo backend"),
        ({"inner": "mhc"}, MHCOptionError, "rewrite the rewritten"),
        ({"min_sites": 99}, NoResidualError, "at least 99 sites"),
    ],
)
def test_bad_options_at_the_first_call(options, error, match):
    model = Stack()
    compiled = torch.compile(model, backend="mhc", options={**QUICK, **options})
    _unchanged(model, lambda: compiled(features()), error, match)


def test_a_mode_without_inductor():
    model = Stack()
    graph_module = torch.fx.symbolic_trace(model)
    # torch.compile takes either a mode or options, so the inner compiler is called with both by hand.
    with pytest.raises(MHCOptionError, match="mode="):
        compile_inner(graph_module, [features()], MHCConfig(inner="eager"), "max-autotune")


def test_no_residual_add():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    _unchanged(
        model,
        lambda: torch.compile(model, backend="mhc", options=QUICK)(features()),
        NoResidualError,
        "no add of two tensors",
    )
    _unchanged(model, lambda: mhc_compile.attach(model, features()), NoResidualError, "min_sites=1")
    loose = torch.compile(model, backend="mhc", options={**QUICK, "strict": False})
    assert torch.equal(loose(features()), model(features()))


def test_a_config_that_differs_from_the_attached_one():
    model = Stack()
    mhc_compile.attach(model, features(), config=MHCConfig(n_streams=2))
    with pytest.raises(ConfigMismatchError, match=r"n_streams=2.*detach"):
        mhc_compile.attach(model, features(), config=MHCConfig(n_streams=4))
    with pytest.raises(ConfigMismatchError, match="n_streams=4"):
        torch.compile(model, backend="mhc", options={**QUICK, "n_streams": 4})(features())
    # Left out, or about the computation alone: no conflict.
    torch.compile(model, backend="mhc", options={**QUICK, "sinkhorn_iters": 5})(features())
    # The function is inherited, how it is compiled is not.
    attached = MHCConfig(n_streams=2, sinkhorn_iters=7, inner="eager")
    assert MHCConfig.from_options({}, attached) == MHCConfig(n_streams=2, sinkhorn_iters=7)
    assert mhc_compile.parameters(model)["blocks.0.mhc.mlp.phi"].shape[0] == 8


class BreakingBlock(Block):
    def forward(self, hidden):
        hidden = hidden + self.mixer(self.norm1(hidden))
        update = self.mlp(self.norm2(hidden))
        torch._dynamo.graph_break()
        return hidden + torch.tanh(update)


class BreaksInBranch(Stack):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), BreakingBlock(), Block()])

    def forward(self, values):
        hidden = self.blocks[0](self.stem(values))
        hidden = self.blocks[1](hidden)
        return self.readout(self.blocks[2](hidden))


@pytest.mark.parametrize("broken", [BreaksBetween, BreaksInLoop, BreaksInBranch])
def test_a_graph_break_through_the_stream(broken):
    model = broken()
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    with pytest.warns() if broken is not BreaksInLoop else pytest.raises(StreamCutError):
        _unchanged(model, lambda: compiled(features()), StreamCutError, "graph break")
        if broken is BreaksInLoop:
            raise StreamCutError("seen above")
    torch._dynamo.reset()
    if broken is BreaksInBranch:
        _unchanged(model, lambda: mhc_compile.attach(model, features()), StreamCutError, r"graph_break.*inside")


def test_a_break_outside_the_stream_is_none_of_our_business():
    class BreaksBefore(Stack):
        def forward(self, values):
            values = values * 2
            torch._dynamo.graph_break()
            hidden = super().forward(values)
            torch._dynamo.graph_break()
            return hidden * 2

    model = BreaksBefore()
    plain = model(features())
    report = mhc_compile.attach(model, features())
    assert len(report.sites) == 4
    rewritten = torch.compile(model, backend="mhc", options=QUICK)(features())
    torch.testing.assert_close(rewritten, plain, rtol=1e-5, atol=1e-6)


def test_every_error_is_an_mhc_error():
    import mhc_compile.errors as errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert all(issubclass(kind, errors.MHCError) or issubclass(kind, Warning) for kind in kinds)
    assert len(kinds) > 8
