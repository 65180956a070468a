"""The command line: what MODEL may be, what is printed, and how it fails."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig
from typer.testing import CliRunner

import mhc_compile
from mhc_compile.__main__ import app
from mhc_compile.cli_models import from_config, load_example

LLAMA = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}

MODULE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)

class Model(nn.Sequential):
    def forward(self, x, scale=1.0):
        return super().forward(x * scale)

def model():
    return Model(Block(), Block(), Block())

def a_dict():
    return model(), {"x": torch.ones(2, 8), "scale": 2.0}

def a_tuple():
    return model(), (torch.ones(2, 8),)

def a_tensor():
    return model(), torch.ones(2, 8)

def no_inputs():
    return model()

def broken():
    raise ValueError("no such luck")
"""


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    name = f"models_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in __import__("sys").path if entry])
    return name


def test_a_saved_config_is_explained_from_its_folder_and_from_its_file(tmp_path):
    LlamaConfig(**LLAMA).save_pretrained(tmp_path)
    printed = json.loads(run("explain", tmp_path, "--json", "--streams", 2).stdout)
    assert [site["name"] for site in printed["chains"][0]["sites"]] == [
        f"model.layers.{layer}.mhc.{part}" for layer in range(2) for part in ("self_attn", "mlp")
    ]
    assert printed["config"]["n_streams"] == 2
    as_text = run("explain", tmp_path / "config.json")
    assert as_text.exit_code == 0
    assert "4 sites in 1 chain," in as_text.stdout


def test_a_llama_of_8b_parameters_is_explained_without_weights(tmp_path):
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(tmp_path)
    example = load_example(str(tmp_path))
    tensors = [*example.model.parameters(), *example.model.buffers()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors if not tensor.is_meta) < 1e6
    printed = json.loads(run("explain", tmp_path, "--json").stdout)
    assert printed["parameters_before"] == 8_030_261_248
    assert [len(chain["sites"]) for chain in printed["chains"]] == [64]
    # 64 sites of phi [24, 4·4096], 3 scales and 24 biases.
    assert printed["parameters_added"] == 64 * (24 * 4 * 4096 + 27)


@pytest.mark.parametrize("function", ["a_dict", "a_tuple", "a_tensor"])
def test_a_function_of_the_current_folder_is_explained(module, function):
    result = run("explain", f"{module}:{function}", "--json")
    assert result.exit_code == 0, result.output
    names = [site["name"] for chain in json.loads(result.stdout)["chains"] for site in chain["sites"]]
    assert names == ["0.mhc.linear", "1.mhc.linear", "2.mhc.linear"]


def test_options_reach_the_report(module):
    short = run("explain", f"{module}:a_tensor", "--json", "--min-sites", 4)
    assert json.loads(short.stdout)["chains"] == []
    picked = run("explain", f"{module}:a_tensor", "--json", "--sites", "[01].*", "--manifold", "identity")
    printed = json.loads(picked.stdout)
    assert [site["owner"] for site in printed["chains"][0]["sites"]] == ["0", "1"]
    assert printed["config"]["manifold"] == "identity"


def test_html_is_written_where_asked(module, tmp_path):
    result = run("explain", f"{module}:a_tensor", "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "0–2.mhc.linear" in (tmp_path / "page.html").read_text()
    nowhere = run("explain", f"{module}:a_tensor", "--html", tmp_path / "no" / "such" / "page.html")
    assert nowhere.exit_code == 1
    assert "cannot write" in nowhere.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lama", "Did you mean llama"),
        ("no_such_module:function", "importable from the current folder"),
        ("{module}:a_tupel", "Did you mean a_tuple"),
        ("{module}:no_inputs", "must return (model, inputs)"),
        ("{module}:broken", "ValueError: no such luck"),
        (".", "holds no config.json"),
        ("{module}.py", "is no JSON file"),
    ],
)
def test_a_bad_model_is_an_error_with_the_way_out(module, name, said):
    result = run("explain", name.format(module=module))
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


def test_a_config_of_an_unknown_type_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "lllama"}')
    result = run("explain", tmp_path)
    assert result.exit_code == 2
    assert "near: llama" in result.stderr


def test_an_error_of_the_package_is_its_message(module):
    result = run("explain", f"{module}:a_tensor", "--streams", 0)
    assert result.exit_code == 1
    assert "n_streams=0: must be between 1 and 8" in result.stderr
    assert "Traceback" not in result.output


SMALL = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2},
    "vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    "whisper": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_source_positions": 50}
    | {f"{half}_{what}": 2 for half in ("encoder", "decoder") for what in ("attention_heads", "ffn_dim")},
}


@pytest.mark.parametrize(
    ("kind", "inputs", "sites"),
    [
        ("bert", {"input_ids"}, 4),
        ("t5", {"input_ids", "decoder_input_ids"}, 10),
        ("vit", {"pixel_values"}, 4),
        ("whisper", {"input_features", "decoder_input_ids"}, 5),
    ],
)
def test_example_inputs_fit_the_model(kind, inputs, sites):
    example = from_config(CONFIG_MAPPING[kind](**SMALL[kind]))
    given = {name for name, value in example.kwargs.items() if isinstance(value, torch.Tensor)}
    assert given == inputs
    assert len(mhc_compile.explain(example.model, **example.kwargs).sites) == sites
