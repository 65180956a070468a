"""Predictions: what is counted in the plain model, what mHC adds to it, and how the command line shows it."""

import json

import pytest
import torch
from mhc_compile.kernels.costs import traffic
from mhc_compile.kernels.costs.gpus import GPUS
from mhc_compile.passes.count_branch_work import BranchWork, count_branch_work
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from typer.testing import CliRunner

import mhc_compile
from mhc_compile import MHCConfig, MHCError, MHCOptionError
from mhc_compile.__main__ import app
from mhc_compile.planning.chain_sizes import ChainSize
from mhc_compile.reports.prediction import Workload, predict

from .models import Stack, llama, token_ids

LAYERS, WIDTH = 32, 4096
# Of one Llama-3-8B layer: attention and MLP projections.
LAYER_PARAMETERS = WIDTH * (2 * WIDTH + 2 * 1024) + 3 * WIDTH * 14336


def chain(**changes):
    same = {"sites": 2 * LAYERS, "tokens": 16, "width": WIDTH, "dtype": torch.bfloat16, "device": torch.device("meta")}
    return ChainSize(**{**same, **changes})


def layers_alone(tokens=16):
    return BranchWork(flops=2 * LAYERS * LAYER_PARAMETERS * tokens, saved_bytes=1000 * tokens)


def by_fusion(prediction):
    return {row.fusion: row for row in prediction.fusions}


def test_floor_of_a_llama_8b_layer_on_an_h200():
    # By hand, at 4.32 TB/s and 603 TFLOP/s: 10C forward, 15C backward, 53 of 64 forwards again, less 6C, two sites a
    # layer; against 1.3 GFLOP for each token.
    rows = by_fusion(predict([chain()], layers_alone(), 4, Workload(8192, "h200")))
    per_site = (10 + 15 + 10 * 53 / 64 - 6) * WIDTH * 2 / 4.32e12
    by_hand = 2 * per_site / (6 * LAYER_PARAMETERS / 603e12)
    # The coefficients, phi, and the ends of the chain come on top.
    assert by_hand < rows["boundary"].least_recomputed < 1.06 * by_hand
    assert 0.045 < rows["boundary"].least_recomputed < 0.055
    assert rows["boundary"].least_stored < rows["boundary"].least_recomputed


def test_a_prediction_is_of_the_manifold():
    names = ("identity", "kronecker", "sinkhorn", "permutation")
    found = [predict([chain()], layers_alone(), 4, Workload(8192, "h200"), name) for name in names]
    for amount in ("stored", "least_recomputed"):
        shares = [getattr(by_fusion(one)["boundary"], amount) for one in found]
        assert shares == sorted(set(shares))
    bytes_kept = [one.stored_bytes for one in found]
    # Floats of the projection, a token and site.
    assert [kept - bytes_kept[0] for kept in bytes_kept] == [4 * 64 * 8192 * more for more in (0, 2, 16, 24)]


def test_kernels_are_predicted_by_counted_bytes_at_a_stated_share_of_a_copy():
    # By hand, at four fifths of 4.32 TB/s: 14C forward, 34C backward, less 6C.
    found = predict([chain()], layers_alone(), 4, Workload(8192, "h200"))
    per_site = (14 + 34 - 6) * WIDTH * 2 / (0.8 * 4.32e12)
    by_hand = 2 * per_site / (6 * LAYER_PARAMETERS / 603e12)
    # The coefficients' partial sums, phi and its gradient's, and the ends of the chain come on top.
    assert by_hand < by_fusion(found)["boundary"].stored < 1.1 * by_hand
    assert "80% of a copy's rate" in str(found)


def test_folded_norms_are_taken_off_boundaries_alone():
    # By hand: 2C forward and 3C backward at 64 sites, less the norms' statistics, which are a few floats a token.
    plain, folded = (
        by_fusion(predict([chain(normed=normed)], layers_alone(), 4, Workload(8192, "h200"))) for normed in (0, 64)
    )
    by_hand = 2 * 5 * WIDTH * 2 / (0.8 * 4.32e12) / (6 * LAYER_PARAMETERS / 603e12)
    assert 0.95 * by_hand < plain["boundary"].stored - folded["boundary"].stored < by_hand
    saved = plain["boundary"].least_stored - folded["boundary"].least_stored
    assert 0.95 * 0.8 * by_hand < saved < 0.8 * by_hand
    assert all(plain[fusion] == folded[fusion] for fusion in ("inductor", "paper", "site"))


@pytest.mark.parametrize("gpu", list(GPUS))
def test_every_fusion_costs_less_than_the_one_before(gpu):
    rows = predict([chain()], layers_alone(), 4, Workload(8192, gpu)).fusions
    assert [row.fusion for row in rows] == ["inductor", "paper", "site", "boundary"]
    for field in ("least_stored", "stored", "least_recomputed", "recomputed"):
        shares = [getattr(row, field) for row in rows]
        assert shares == sorted(shares, reverse=True)
        assert len(set(shares)) == 4
    for row in rows:
        assert row.stored >= row.least_stored
        assert row.recomputed >= row.least_recomputed


def test_memory_and_interval_are_those_of_the_cost_model():
    found = predict([chain()], layers_alone(), 4, Workload(8192, "h200"))
    assert found.intervals == (traffic.recompute_interval(64, 4),) == (6,)
    assert found.plain_bytes == 8192 * 1000
    kept = traffic.saved_bytes_per_token(64, 4, WIDTH, 2)
    replayed = traffic.saved_bytes_per_token(64, 4, WIDTH, 2, 6)
    assert found.stored_bytes - found.plain_bytes == 8192 * kept
    assert found.recomputed_bytes - found.plain_bytes == 8192 * replayed
    assert found.recomputed_bytes < found.stored_bytes


def test_more_tokens_are_more_of_the_same_sequences():
    few, many = (predict([chain()], layers_alone(), 4, Workload(tokens, "h100")) for tokens in (8192, 4 * 8192))
    assert many.plain_seconds == pytest.approx(4 * few.plain_seconds)
    assert many.stored_bytes == 4 * few.stored_bytes
    traced = predict([chain()], layers_alone(), 4, Workload())
    assert traced.tokens == 16


def test_chains_add_up():
    work = layers_alone()
    encoder, decoder = chain(sites=20), chain(sites=30, tokens=8)
    both = predict([encoder, decoder], work, 4, Workload(1600))
    alone = [predict([encoder], work, 4, Workload(1600)), predict([decoder], work, 4, Workload(800))]
    assert both.intervals == (alone[0].intervals[0], alone[1].intervals[0])
    assert both.stored_bytes - both.plain_bytes == sum(one.stored_bytes - one.plain_bytes for one in alone)
    added = [by_fusion(one)["site"].stored for one in alone]
    assert by_fusion(both)["site"].stored == pytest.approx(sum(added))


def test_float32_runs_at_half_the_rate():
    wide, narrow = (
        predict([chain(dtype=dtype)], layers_alone(), 4, Workload()) for dtype in (torch.float32, torch.half)
    )
    assert wide.plain_seconds == 2 * narrow.plain_seconds
    with pytest.raises(MHCOptionError, match="float64"):
        predict([chain(dtype=torch.float64)], layers_alone(), 4, Workload())


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal, self.query = causal, nn.Linear(16, 16, bias=False)

    def forward(self, hidden):
        query = self.query(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(query, query * 2, query * 3, is_causal=self.causal)


def counted(model, *inputs):
    """Count a model in the backend, as `explain` does."""
    found = []

    def backend(graph_module, example_inputs):
        found.append(count_branch_work(graph_module))
        return graph_module

    torch.compile(model, backend=backend)(*inputs)
    assert len(found) == 1
    return found[0]


def test_counts_are_those_of_an_eager_run():
    model, features = Stack(depth=2), torch.randn(5, 7, 32)
    storages = {}
    skipped = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), features)}

    def hold(tensor):
        address = tensor.untyped_storage().data_ptr()
        if address not in skipped:
            storages[address] = tensor
        return tensor

    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        model(features)
    found = counted(model, features)
    assert found.flops == flops.get_total_flops() > 0
    assert found.saved_bytes == sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) > 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_as_a_fused_kernel(device):
    with torch.device(device):
        features = torch.randn(3, 10, 16)
        models = {causal: Attention(causal) for causal in (False, True)}
    linear, product = 2 * 3 * 10 * 16 * 16, 2 * 2 * 3 * 2 * 10 * 10 * 8
    kept = 4 * 3 * 10 * 16 * 4 + 4 * 3 * 2 * 10
    assert counted(models[False], features) == BranchWork(linear + product, kept)
    assert counted(models[True], features) == BranchWork(linear + product // 2, kept)


class Experts(nn.Module):
    def forward(self, rows, weights, ends):
        return torch._grouped_mm(rows, weights, offs=ends)


def test_a_mixture_counts_the_experts_that_a_token_takes():
    rows, weights = (torch.zeros(*size, dtype=torch.bfloat16, device="meta") for size in ((24, 32), (4, 32, 16)))
    ends = torch.zeros(4, dtype=torch.int32, device="meta")
    assert counted(Experts(), rows, weights, ends).flops == 2 * 24 * 32 * 16


def test_a_look_counts_and_changes_nothing():
    model, ids = llama(), token_ids()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = mhc_compile.explain(model, input_ids=ids, predict_for=Workload(1000, "A100"))
    assert report.prediction.gpu == "a100"
    assert report.prediction.tokens == 1000
    assert report.prediction.dtype == "float32"
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert "Predicted, not measured" in str(report)
    plain = mhc_compile.explain(model, input_ids=ids)
    assert plain.prediction is None
    assert plain.to_dict()["prediction"] is None
    assert "Predicted" not in str(plain)


def test_what_cannot_be_predicted_says_why(monkeypatch):
    with pytest.raises(MHCOptionError, match="known are a100, h100, h200, b200, mi300x"):
        Workload(gpu="gtx")
    with pytest.raises(MHCOptionError, match="tokens=0: must be at least 1"):
        Workload(tokens=0)
    with pytest.raises(MHCOptionError, match="no residual chain was found"):
        mhc_compile.explain(nn.Linear(4, 4), torch.ones(2, 4), config=MHCConfig(strict=False), predict_for=Workload())

    def refuse(self, *inputs):
        raise RuntimeError("needs data")

    monkeypatch.setattr("mhc_compile.passes.count_branch_work.Interpreter.run", refuse)
    with pytest.raises(MHCError, match="does not run on shapes alone: needs data"):
        mhc_compile.explain(Stack(), torch.randn(2, 32), predict_for=Workload())


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_llama_8b_is_predicted_from_its_configuration(tmp_path):
    LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    page = tmp_path / "page.html"
    result = run("explain", tmp_path, "--tokens", 16384, "--gpu", "h200", "--json", "--html", page)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["prediction"]
    assert (found["measured"], found["tokens"], found["dtype"], found["intervals"]) == (False, 16384, "bfloat16", [6])
    # The layers alone take 1.3 GFLOP each a token; readout and attention over 8192 tokens come to a third more.
    layers = 6 * LAYERS * LAYER_PARAMETERS * 16384 / 603e12
    assert 1.2 * layers < found["plain_seconds"] < 1.5 * layers
    rows = {row["fusion"]: row for row in found["fusions"]}
    assert (found["normed"], found["sites"]) == (2 * LAYERS, 2 * LAYERS)
    # As above, less 5C of the norms that are folded in; the coefficients, phi and the ends of the chain come on top.
    by_hand = 2 * LAYERS * 16384 * (10 + 15 + 10 * 53 / 64 - 6 - 5) * WIDTH * 2 / 4.32e12 / found["plain_seconds"]
    assert by_hand < rows["boundary"]["least_recomputed"] < 1.06 * by_hand
    assert rows["inductor"]["recomputed"] > rows["paper"]["recomputed"] > rows["site"]["recomputed"]
    assert rows["site"]["recomputed"] > rows["boundary"]["recomputed"] > rows["boundary"]["least_recomputed"]
    assert found["auto"]["fusion"] == "boundary"
    text = page.read_text(encoding="utf-8")
    assert "Predicted, not measured: one training step of 16,384 tokens in bfloat16 on one h200." in text
    assert f"{rows['boundary']['least_recomputed']:.1%}" in text


def test_either_option_asks_for_a_prediction(tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=64, max_position_embeddings=64, **small).save_pretrained(tmp_path)
    for option, tokens, gpu in ((("--gpu", "b200"), 8192, "b200"), (("--tokens", 100), 100, "h200")):
        result = run("explain", tmp_path, *option)
        assert result.exit_code == 0, result.output
        assert f"{tokens:,} tokens in bfloat16 on one {gpu}." in " ".join(result.stdout.split())
        # One sequence is as long as the model takes.
        assert "1x64x32 bfloat16" in result.stdout
    unknown = run("explain", tmp_path, "--gpu", "h2")
    assert unknown.exit_code == 1
    assert "known are a100" in unknown.stderr
