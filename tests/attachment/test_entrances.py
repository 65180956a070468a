"""A part of a model that is called by itself runs rewritten, with the same parameters."""

import copy
import functools

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import UnrewrittenCallError

from ..carrying import compile_blocks, perturb
from ..models import CASES, Stack, bart, features, t5, whisper

# What is tested here is which calls are rewritten: what compiles them then makes no difference.
QUICK = {"inner": "eager"}
SMALL = {**CASES, **{build.__name__: functools.partial(build, 1) for build in (t5, bart, whisper)}}


def attached(name):
    torch.manual_seed(0)
    model, inputs = SMALL[name]().build().eval(), SMALL[name]().inputs()
    mhc_compile.attach(model, **inputs)
    perturb(model)
    return model, inputs


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_generation_with_an_encoder(name):
    model, inputs = attached(name)
    inputs.pop("labels", None)
    plain = copy.deepcopy(model)
    mhc_compile.detach(plain)
    model.compile(backend="mhc", options=QUICK)
    key = model.main_input_name
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    greedy = model.generate(inputs[key], **options)
    assert greedy.shape[0] == inputs[key].shape[0]
    if name == "t5":
        assert model.generate(inputs[key], num_beams=2, **options).shape[0] == inputs[key].shape[0]
        # Without the cache, each step runs the whole model: the encoder alone has to agree with the encoder inside.
        assert torch.equal(greedy, model.generate(inputs[key], use_cache=False, **options))
    # Three generations have used up the graphs that Dynamo keeps of one function.
    torch._dynamo.reset()
    hidden = model.get_encoder()(inputs[key]).last_hidden_state
    whole = model(**{key: inputs[key], "decoder_input_ids": greedy[:, :1]}).encoder_last_hidden_state
    torch.testing.assert_close(hidden, whole, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(hidden, plain.get_encoder()(inputs[key]).last_hidden_state, atol=1e-3)


def test_towers():
    model, inputs = attached("clip")
    model.compile(backend="mhc", options=QUICK)
    both = model(**inputs)
    alone = model.get_image_features(pixel_values=inputs["pixel_values"])
    alone = getattr(alone, "pooler_output", alone)
    torch.testing.assert_close(alone / alone.norm(dim=-1, keepdim=True), both.image_embeds, rtol=1e-5, atol=1e-5)


def test_the_model_without_its_head():
    model, inputs = attached("llama")
    model.compile(backend="mhc", options=QUICK)
    whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model(inputs["input_ids"]).last_hidden_state, whole, rtol=1e-5, atol=1e-5)


def test_a_part_is_refused_while_the_model_is_not_compiled_in_place():
    model, inputs = attached("t5")
    with pytest.raises(UnrewrittenCallError):
        model.get_encoder()(inputs["input_ids"])
    torch.compile(model, backend="mhc", options=QUICK)(**inputs)
    with pytest.raises(UnrewrittenCallError):
        model.get_encoder()(inputs["input_ids"])


def test_a_part_compiled_by_itself():
    model, inputs = attached("t5")
    want = torch.compile(model, backend="mhc", options=QUICK)(**inputs).encoder_last_hidden_state
    model.encoder.compile(backend="mhc", options=QUICK)
    torch.testing.assert_close(model.encoder(inputs["input_ids"]).last_hidden_state, want, rtol=1e-5, atol=1e-5)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        return self.inner(inputs) * self.gain


@pytest.mark.parametrize("in_place", [True, False])
def test_an_attached_model_inside_a_wrapper(in_place):
    model = Stack()
    mhc_compile.attach(model, features())
    perturb(model)
    want = torch.compile(copy.deepcopy(model), backend="mhc", options=QUICK)(features())
    wrapper = Wrapper(model)
    if in_place:
        wrapper.compile(backend="mhc", options=QUICK)
    compiled = wrapper if in_place else torch.compile(wrapper, backend="mhc", options=QUICK)
    torch.testing.assert_close(compiled(features()), want, rtol=1e-6, atol=1e-6)
    compiled(features()).sum().backward()
    assert all(parameter.grad is not None for parameter in mhc_compile.parameters(wrapper).values())


def test_parts_of_a_deep_copy():
    model = Wrapper(Stack())
    mhc_compile.attach(model, features())
    twin = copy.deepcopy(model)
    perturb(twin)
    for each in (model, twin):
        each.compile(backend="mhc", options=QUICK)
    alone = twin.inner(features())
    assert torch.equal(alone, torch.compile(copy.deepcopy(twin).inner, backend="mhc", options=QUICK)(features()))
    # The original still stands at the start, where it computes what the plain model does.
    original = model.inner(features())
    assert not torch.allclose(alone, original, atol=1e-3)
    mhc_compile.detach(twin)
    torch.testing.assert_close(twin.inner(features()), original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_block", [True, False])
def test_adapters_of_peft(by_block):
    from peft import LoraConfig, get_peft_model

    model, inputs = attached("llama")
    want = torch.compile(copy.deepcopy(model), backend="mhc", options=QUICK)(**inputs).loss
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    if by_block:
        compile_blocks(adapted, backend="mhc", options=QUICK)
    compiled = adapted if by_block else torch.compile(adapted, backend="mhc", options=QUICK)
    loss = compiled(**inputs).loss
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=1e-6)
    loss.backward()
    assert all(value.grad is not None for name, value in adapted.named_parameters() if "lora_B" in name)


def test_detach_closes_the_entrances():
    model, inputs = attached("t5")
    mhc_compile.detach(model)
    assert model.get_encoder()(inputs["input_ids"]).last_hidden_state.isfinite().all()
    assert all(module._compiled_call_impl is None for module in model.modules())


@pytest.mark.parametrize("blocks", [False, True])
def test_detach_ends_compiling_in_place(blocks):
    model = Stack()
    plain = model(features())
    mhc_compile.attach(model, features())
    for module in model.blocks if blocks else [model]:
        module.compile(backend="mhc", options=QUICK)
    assert torch.allclose(model(features()), plain, atol=1e-6)
    mhc_compile.detach(model)
    assert torch.equal(model(features()), plain)
    assert not mhc_compile.parameters(model)
