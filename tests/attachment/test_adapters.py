"""peft and mHC parameters, in either order: trained, saved with the adapter, switched with it."""

import copy
import functools
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import mhc_compile
from mhc_compile import MHCWarning

from ..models import llama, token_ids

# Adapters change which parameters a graph is given, before anything compiles it.
QUICK = {"inner": "eager"}
LORA = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def adaptable():
    return llama(num_hidden_layers=1)


@functools.cache
def _attached():
    model = adaptable()
    mhc_compile.attach(model, input_ids=token_ids())
    return model


def attached():
    return copy.deepcopy(_attached())


def perturb(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="mhc", options=QUICK)(input_ids=token_ids()).logits


@pytest.mark.parametrize("first", ["attach", "adapt"])
def test_an_adapter_trains_and_saves_the_mhc_parameters(tmp_path, first):
    if first == "attach":
        model = get_peft_model(perturb(attached(), 1), LoraConfig(**LORA, modules_to_save=["mhc"])).eval()
    else:
        model = get_peft_model(adaptable(), LoraConfig(**LORA)).eval()
        mhc_compile.attach(model, input_ids=token_ids())
    ours = mhc_compile.parameters(perturb(model))
    assert set(ours) <= set(model.state_dict())
    wanted = logits(model)
    wanted.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in ours.values())
    model.save_pretrained(tmp_path)
    saved = [name for name in load_file(tmp_path / "adapter_model.safetensors") if name.endswith("mhc.mlp.phi")]
    assert len(saved) == 1
    loaded = PeftModel.from_pretrained(attached(), tmp_path).eval()
    assert torch.equal(logits(loaded), wanted)
    merged = logits(loaded.merge_and_unload())
    torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-5)


def test_switching_adapters_switches_the_mixing():
    base = perturb(attached(), 1)
    plain = logits(base).detach()
    model = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["mhc"])).eval()
    compiled = torch.compile(model, backend="mhc", options=QUICK)
    perturb(model)
    first = compiled(input_ids=token_ids()).logits
    model.add_adapter("second", LoraConfig(**LORA, modules_to_save=["mhc"]))
    model.set_adapter("second")
    assert not torch.allclose(compiled(input_ids=token_ids()).logits, first, atol=1e-3)
    model.set_adapter("default")
    assert torch.equal(compiled(input_ids=token_ids()).logits, first)
    with model.disable_adapter():
        assert torch.equal(compiled(input_ids=token_ids()).logits, plain)


def test_an_adapter_without_the_mhc_parameters_is_warned_of():
    # A copy of an attached model is watched as the model is.
    model = get_peft_model(attached(), LoraConfig(**LORA))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits(model).sum().backward()
    with pytest.warns(MHCWarning, match=r'modules_to_save=\["mhc"\]'):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
