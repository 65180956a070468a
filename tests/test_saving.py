"""From a trained model to a folder and back, and what keeps a checkpoint from being loaded as another model."""

import copy
import functools
import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mhc_compile
from mhc_compile import ConfigMismatchError, MHCConfig, MHCError, MHCOptionError, NotAttachedError
from mhc_compile.sharing.saving import CONFIG_FILE, WEIGHTS_FILE

from .models import decoder, llama, token_ids


def tied():
    return llama(tie_word_embeddings=True, num_hidden_layers=1)


@functools.cache
def _attached():
    model = tied()
    mhc_compile.attach(model, input_ids=token_ids())
    return model


def attached(model=None, **options):
    if model is None and not options:
        return copy.deepcopy(_attached())
    model = tied() if model is None else model
    mhc_compile.attach(model, input_ids=token_ids(), **options)
    return model


def trained(model=None, **options):
    model = attached(model, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="mhc", options={"inner": "eager"})(input_ids=token_ids()).logits.detach()


@pytest.mark.parametrize(
    ("options", "shards"),
    [
        ({"manifold": "none", "sinkhorn_iters": 3}, {"max_shard_size": "20KB"}),
        ({"readout": "learned", "sites": lambda name: "mlp" in name, "min_sites": 1, "n_streams": 3}, {}),
    ],
)
def test_a_folder_gives_the_model_back_without_tracing_it(tmp_path, monkeypatch, options, shards):
    model = trained(**options)
    wanted = logits(model)
    mhc_compile.save_pretrained(torch.compile(model), tmp_path, **shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shards)
    with monkeypatch.context() as patch:
        patch.setattr("mhc_compile.api.look", None)
        loaded = mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert list(mhc_compile.parameters(loaded)) == list(mhc_compile.parameters(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), wanted)
    with pytest.raises(mhc_compile.UnrewrittenCallError):
        loaded(input_ids=token_ids())


def test_weights_that_transformers_renames_come_back(tmp_path):
    torch.manual_seed(0)
    model = trained(
        decoder("MixtralConfig", num_key_value_heads=2, num_local_experts=2, num_hidden_layers=1).build().eval()
    )
    wanted = logits(model)
    mhc_compile.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    assert not any(".mhc." in name for name in load_file(tmp_path / "ours" / "model.safetensors"))
    assert "model.layers.0.mhc.mlp.phi" not in load_file(tmp_path / "theirs" / "model.safetensors")
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path / folder)), wanted)


def test_a_folder_of_the_model_alone_is_attached_by_tracing(tmp_path):
    model = trained(n_streams=2, manifold="none")
    model.save_pretrained(tmp_path)
    loaded = mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_transformers_own_loading_names_ours_once(tmp_path, caplog):
    mhc_compile.save_pretrained(trained(), tmp_path)
    logger = logging.getLogger("transformers")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(caplog.handler)
    # transformers propagates where the environment says CI, and caplog's handler stands at the root as well.
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        AutoModelForCausalLM.from_pretrained(tmp_path)
        reports = [r.getMessage() for r in caplog.records if "LOAD REPORT" in r.getMessage()]
        assert [report.count("mhc") for report in reports] == [1]
        assert "mhc_compile.from_pretrained | UNEXPECTED" in reports[0]
        caplog.clear()
        mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path)
        assert not any("LOAD REPORT" in r.getMessage() for r in caplog.records)
    finally:
        logger.removeHandler(caplog.handler)
        logger.propagate = propagate
        logger.setLevel(level)


def test_what_cannot_be_saved_or_loaded_says_why(tmp_path):
    tied().save_pretrained(tmp_path / "plain")
    with pytest.raises(NotAttachedError, match="holds no mHC parameters"):
        mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path / "plain")
    with pytest.raises(NotAttachedError, match="saves it as it is"):
        mhc_compile.save_pretrained(tied(), tmp_path / "plain")
    with pytest.raises(MHCOptionError, match="upload_folder"):
        mhc_compile.save_pretrained(trained(), tmp_path / "pushed", push_to_hub=True)
    mhc_compile.save_pretrained(trained(), tmp_path / "ours")
    deeper = trained(llama(num_hidden_layers=2))
    mhc_compile.save_pretrained(deeper, tmp_path / "deeper")
    shutil.copy(tmp_path / "deeper" / WEIGHTS_FILE, tmp_path / "ours" / WEIGHTS_FILE)
    with pytest.raises(MHCError, match="7 unexpected"):
        mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path / "ours")
    shutil.copy(tmp_path / "deeper" / CONFIG_FILE, tmp_path / "ours" / CONFIG_FILE)
    with pytest.raises(ConfigMismatchError, match=r"belong to model.layers.1, which LlamaForCausalLM does not have"):
        mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path / "ours")


@pytest.mark.parametrize("options", [{"manifold": "none"}, {"sinkhorn_iters": 3}, {"on_graph_break": "collapse"}])
def test_a_checkpoint_of_other_options_is_refused_and_both_are_named(options):
    state = trained(**options).state_dict()
    if "manifold" not in options:
        attached().load_state_dict({**trained().state_dict()})
    other = attached()
    name = "collapsed" if "on_graph_break" in options else next(iter(options))
    with pytest.raises(ConfigMismatchError, match=rf"trained with {name}=.* attached with {name}="):
        other.load_state_dict(state)


def test_options_that_change_nothing_do_not_stand_in_the_way():
    model = attached(config=MHCConfig(init="paper", sites="*"))
    model.load_state_dict(trained().state_dict())


def test_the_options_in_a_checkpoint_have_one_length():
    sizes = {len(v) for o in ({}, {"manifold": "identity", "readout": "learned"})
             for name, v in trained(**o).state_dict().items() if name.endswith("_extra_state")}  # fmt: skip
    assert sizes == {128}, "loaded in place, as DCP does, a tensor cannot change its length"


def test_the_site_list_is_plain_json(tmp_path):
    mhc_compile.save_pretrained(trained(), tmp_path)
    listed = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert [site["role"] for site in listed["sites"]] == ["head", "tail"]
    assert listed["sites"][0]["hosts"] == ["model.layers.0.self_attn"]
