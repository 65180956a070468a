"""Hugging Face models of other kinds than language models, and the ways in which language models are called."""

import pytest
import torch

import mhc_compile

from .models import assert_same_function, llama, token_ids
from .preserving import assert_preserved, run

transformers = pytest.importorskip("transformers")


def _pixels(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def _albert():
    config = transformers.AlbertConfig(
        vocab_size=99, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.AlbertModel(config), {"input_ids": token_ids()}


def _swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=4,
    )  # fmt: skip
    return transformers.SwinModel(config), {"pixel_values": _pixels()}


def _resnet():
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_channels=3
    )
    return transformers.ResNetModel(config), {"pixel_values": _pixels()}


def _convnext():
    config = transformers.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2)
    return transformers.ConvNextModel(config), {"pixel_values": _pixels()}


def _mobilenet():
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, image_size=32)
    model = transformers.MobileNetV2Model(config)
    # What follows repeats these blocks at more channels.
    del model.layer[9:]
    model.conv_1x1 = torch.nn.Identity()
    return model, {"pixel_values": _pixels()}


def _perceiver():
    config = transformers.PerceiverConfig(
        num_latents=8, d_latents=32, d_model=16, num_blocks=1, num_self_attends_per_block=2,
        num_self_attention_heads=4, num_cross_attention_heads=4, qk_channels=16, v_channels=32,
    )  # fmt: skip
    inputs = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(1))
    return transformers.PerceiverModel(config), {"inputs": inputs}


# Lengths of the chains; blocks that change the resolution begin a new one.
MODELS = {
    "ALBERT, one shared block": (_albert, [6]),
    "Swin, shifted windows": (_swin, [4]),
    "ResNet": (_resnet, [2, 2]),
    "ConvNeXt": (_convnext, [2, 2]),
    "Perceiver": (_perceiver, [6]),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_other_architectures(kind):
    build, chains = MODELS[kind]
    torch.manual_seed(0)
    model, inputs = build()
    assert_preserved(model.eval(), chains=chains, **inputs)


def test_mobilenet_forward():
    torch.manual_seed(0)
    model, inputs = _mobilenet()
    with torch.no_grad():
        plain = model.eval()(**inputs).last_hidden_state
        report = mhc_compile.attach(model, **inputs)
        rewritten = torch.compile(model, backend="mhc", options={"inner": "eager"})(**inputs).last_hidden_state
    assert [len(chain.sites) for chain in report.chains] == [2, 3]
    assert_same_function([plain], [rewritten], 1e-5)


def test_tied_and_frozen_embeddings():
    model = llama(num_hidden_layers=1, tie_word_embeddings=True)
    model.model.embed_tokens.requires_grad_(False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_preserved(model, chains=[2], input_ids=token_ids(), use_cache=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_lora_by_peft():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(num_hidden_layers=1), config).eval()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    report = assert_preserved(model, chains=[2], input_ids=token_ids(), use_cache=False)
    assert {entry.reason.name for entry in report.rejected} >= {"LINEAR_MAPS", "ROTATION"}
    assert all(not p.requires_grad for name, p in model.named_parameters() if name in frozen)


def test_embeddings_as_inputs():
    model = llama(num_hidden_layers=1)
    embedded = model.get_input_embeddings()(token_ids()).detach()
    assert_preserved(model, chains=[2], inputs_embeds=embedded, use_cache=False)


def test_left_padded_batches():
    model, ids = llama(num_hidden_layers=1), token_ids(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :5] = 0, 0
    assert_preserved(model, chains=[2], input_ids=ids, attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_with_a_cache(cache):
    model, ids = llama(num_hidden_layers=1), token_ids(2, 8)

    def decode(call):
        kind = {"dynamic": transformers.DynamicCache, "static": transformers.StaticCache}[cache]
        held = kind(config=model.config, **({"max_cache_len": 16} if cache == "static" else {}))
        logits = []
        with torch.no_grad():
            for step in (ids[:, :6], ids[:, 6:7], ids[:, 7:]):
                out = call(input_ids=step, past_key_values=held, use_cache=True)
                logits.append(out.logits)
        return logits

    plain = decode(model)
    report = mhc_compile.attach(model, input_ids=ids)
    assert len(report.sites) == 2
    assert_same_function(plain, decode(torch.compile(model, backend="mhc", options={"inner": "eager"})), 1e-5)


def test_training_mode_keeps_batch_norm_statistics():
    torch.manual_seed(0)
    model, inputs = _resnet()
    model.train()
    plain, _ = run(model, model, **inputs)
    running = {name: value.clone() for name, value in model.named_buffers() if "running" in name}
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    mhc_compile.attach(model, **inputs)
    rewritten, _ = run(torch.compile(model, backend="mhc", options={"inner": "eager"}), model, **inputs)
    assert_same_function(plain, rewritten, 1e-4)
    for name, value in model.named_buffers():
        if name in running:
            torch.testing.assert_close(value, running[name], rtol=1e-4, atol=1e-5)
