"""Once parameters are attached, the plain forward never runs silently: every route."""

import copy

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import UnrewrittenCallError
from mhc_compile.backend import mhc

from ..models import QUICK, Stack, features, llama, token_ids


@pytest.fixture
def attached():
    model = Stack()
    mhc_compile.attach(model, features())
    return model


def test_plain_call(attached):
    with pytest.raises(UnrewrittenCallError, match=r"plain forward of Stack.*detach"):
        attached(features())


def test_plain_call_of_a_copy(attached):
    with pytest.raises(UnrewrittenCallError):
        copy.deepcopy(attached)(features())


def test_recompile_limit(attached):
    compiled = torch.compile(attached, backend="mhc", options=QUICK, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(features(5))
        with pytest.raises(UnrewrittenCallError, match="recompile_limit"):
            compiled(features(3))


def test_disabled_compilation(attached):
    compiled = torch.compile(attached, backend="mhc", options=QUICK)
    with pytest.raises(UnrewrittenCallError):
        torch.compiler.disable(compiled)(features())
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnrewrittenCallError):
        compiled(features())


def test_suppressed_errors(attached):
    with torch._dynamo.config.patch(suppress_errors=True):
        compiled = torch.compile(attached, backend="mhc", options={**QUICK, "n_streams": 3})
        with pytest.raises(mhc_compile.MHCError):
            compiled(features())


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_another_backend(attached, backend):
    with pytest.raises(UnrewrittenCallError):
        torch.compile(attached, backend=backend)(features())


@pytest.mark.parametrize("in_place", [False, True])
def test_a_function_around_the_backend_is_asked_what_it_does(attached, in_place):
    def rewrites(graph_module, example_inputs):
        return mhc(graph_module, example_inputs, options=QUICK)

    def does_not(graph_module, example_inputs):
        return graph_module.forward

    def call(backend, **options):
        torch._dynamo.reset()
        if not in_place:
            return torch.compile(attached, backend=backend, **options)(features())
        attached.compile(backend=backend, **options)
        return attached(features())

    assert torch.equal(call(rewrites), call("mhc", options=QUICK))
    with pytest.raises(UnrewrittenCallError):
        call(does_not)


def test_an_export_fails_and_names_the_one_that_works(attached):
    with pytest.raises(UnrewrittenCallError, match=r"mhc_compile\.export\(model"):
        torch.export.export(attached, (features(),))


class Resuming(nn.Module):
    """Breaks before its stream begins; the adds are in its own forward, which resumes behind the break."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, hidden):
        torch._dynamo.graph_break()
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden


def test_a_resumed_frame_that_falls_back():
    model = Resuming()
    mhc_compile.attach(model, features())
    compiled = torch.compile(model, backend="mhc", options=QUICK, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        compiled(features(5))
        # The pre-hook of the module itself was traced into the first frame: a child's sentinel has to catch this.
        with pytest.raises(UnrewrittenCallError):
            compiled(features(3))


def test_a_child_may_be_called_alone(attached):
    assert attached.blocks[0].mlp(features()).shape == (5, 32)


def test_generate_on_the_wrapper_raises_and_on_the_module_runs_rewritten():
    model, prompt = llama(), token_ids(1, 4)
    wanted = model.generate(prompt, max_new_tokens=6, do_sample=False)
    mhc_compile.attach(model, input_ids=prompt)
    with pytest.raises(UnrewrittenCallError):
        torch.compile(model, backend="mhc", options=QUICK).generate(prompt, max_new_tokens=2, do_sample=False)
    model.compile(backend="mhc", options=QUICK)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), wanted)
    static = model.generate(prompt, max_new_tokens=6, do_sample=False, cache_implementation="static")
    assert torch.equal(static, wanted)
    # Prefill and decode graphs, with both caches, found the same parameters.
    assert len(mhc_compile.parameters(model)) == 3 * 4
    assert len(mhc_compile.report(model).graphs) >= 3


def test_detach_gives_the_plain_model_back():
    model = Stack()
    wanted, keys = model(features()), list(model.state_dict())
    mhc_compile.attach(model, features())
    torch.compile(model, backend="mhc", options=QUICK)(features())
    mhc_compile.detach(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(features()), wanted)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activation_checkpointing_on_another_backend():
    """The adds lie in bodies of higher-order operators, where a sentinel may be dropped as dead code."""
    model = llama().train()
    mhc_compile.attach(model, input_ids=token_ids())
    model.gradient_checkpointing_enable()
    with pytest.raises(UnrewrittenCallError):
        torch.compile(model, backend="aot_eager")(token_ids())
