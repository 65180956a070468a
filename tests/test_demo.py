"""The demo, a few steps of it: what it saves, and that its numbers are numbers of the two models."""

import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mhc_compile import MHCError
from mhc_compile.demo.results import DemoResult, RunResult, smoothed
from mhc_compile.demo.runner import run_demo
from mhc_compile.demo.text import VOCABULARY, even_batches, random_batch, standard_library
from mhc_compile.demo.training import DemoOptions, arithmetic_ratio, learning_rate, mhc_run, plain_run
from mhc_compile.gain import ChainGain

# One run of the demo serves most of these tests.
pytestmark = pytest.mark.xdist_group("demo")

TINY = DemoOptions(steps=6, batch=2, length=16, layers=2, width=16, n_streams=2, backend="eager", lr=1e-2)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    printed = io.StringIO()
    threads = torch.get_num_threads()
    files = run_demo(TINY, folder / "out", Console(file=printed, width=100))
    return files, printed.getvalue(), threads


def test_demo_saves_figure_page_and_results(ran):
    files, printed, _ = ran
    assert files.figure.read_bytes().startswith(b"\x89PNG")
    assert "model.layers.0–1.mhc.mlp" in files.report_html.read_text()
    record = json.loads(files.results_json.read_text())
    assert record["options"]["steps"] == 6
    assert [run["name"] for run in record["runs"]] == ["plain", "mHC", "hyper-connections"]
    assert record["gain"]["sites"] == [site.name for site in files.report.sites]
    assert record["verdict"] == files.result.verdict()
    assert "4 sites in 1 chain," in printed
    assert "time per step" in printed


def test_both_runs_start_from_the_same_function_and_learn(ran):
    result = ran[0].result
    assert result.mhc.losses[0] == pytest.approx(result.plain.losses[0], rel=1e-5)
    for run in result.runs:
        assert len(run.losses) == 6
        assert all(math.isfinite(loss) for loss in [*run.losses, *run.held_out_losses])
        assert run.held_out_loss < run.losses[0]
    assert result.mhc.losses[1:] != result.plain.losses[1:]


def test_parameters_of_both_runs_are_counted(ran):
    result, report = ran[0].result, ran[0].report
    assert result.plain.parameters == report.parameters_before
    # Two streams: 2 + 2 + 4 rows over 2·16 columns, as many biases, three scales; four sites.
    assert result.mhc.parameters - result.plain.parameters == 4 * (8 * 32 + 8 + 3) == report.parameters_added


def test_gain_starts_at_one(ran):
    result = ran[0].result
    assert result.gain_before.forward == pytest.approx([1.0] * 4, abs=1e-5)
    assert result.gain_before.backward == pytest.approx([1.0] * 4, abs=1e-5)
    assert len(result.gain.forward) == len(result.gain_unconstrained.forward) == 4
    # Doubly stochastic matrices amplify by rounding alone; nothing holds the others back.
    assert max(result.gain.forward) < 1.001 < max(result.gain_unconstrained.forward)


def test_arithmetic_is_counted():
    width, tokens = TINY.width, TINY.batch * TINY.length
    block = 4 * width * width + 3 * width * 3 * width + 2 * TINY.length * width
    plain = 2 * tokens * (TINY.layers * block + width * VOCABULARY)
    ours = 2 * tokens * 2 * TINY.layers * (8 * 2 * width + 8 * width)
    assert arithmetic_ratio(plain_run(TINY), TINY, 2 * TINY.layers) == pytest.approx(1 + ours / plain)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"width": 20}, "multiple of 8"), ({"steps": 0}, "at least 1"), ({"length": 1}, "next")],
)
def test_bad_sizes_are_refused_before_anything_runs(tmp_path, changed, said):
    options = DemoOptions(**{**TINY.to_dict(), **changed})
    with pytest.raises(MHCError, match=said):
        run_demo(options, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_holds_out_whole_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(name * 5)
    text = standard_library(tmp_path)
    assert bytes(text.train.tolist()) == b"aaaaaccccc"
    assert bytes(text.held_out.tolist()) == b"bbbbb"
    (tmp_path / "a.py").write_bytes("é!".encode())
    assert bytes(standard_library(tmp_path).train.tolist()) == b"??!ccccc"
    with pytest.raises(MHCError, match="no Python sources"):
        standard_library(tmp_path / "nowhere")


def test_batches_are_windows_of_the_text():
    text = torch.arange(100, dtype=torch.uint8)
    batch = random_batch(text, 3, 10, torch.Generator().manual_seed(1))
    assert batch.shape == (3, 10)
    assert torch.equal(batch - batch[:, :1], torch.arange(10).expand(3, 10))
    assert torch.equal(batch, random_batch(text, 3, 10, torch.Generator().manual_seed(1)))
    first, second = even_batches(text, 2, 10, 2)
    assert first[:, 0].tolist() == [0, 60]
    assert second[:, 0].tolist() == [30, 90]


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    options = DemoOptions(steps=100, lr=1.0)
    rates = [learning_rate(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_smoothing_keeps_a_constant_curve():
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0] * 3)
    curve = smoothed([4.0, 0.0])
    assert curve[0] == pytest.approx(4.0)
    assert curve[1] == pytest.approx(4.0 * 0.8 / 1.8)


@pytest.mark.parametrize(
    ("held_out", "said"),
    [
        ([1.0, 2.0, 3.0], "mHC is better than the plain model, by 1.0033"),
        ([3.1, 4.0, 5.2], "the plain model is better than mHC"),
        ([1.0, 4.0, 4.0], "the two are level"),
    ],
)
def test_verdict_says_which_is_better_only_beyond_twice_the_error(held_out, said):
    plain = RunResult("plain", [3.0], 3.0, [2.0, 3.0, 4.01], 1.0, 1.0, 10)
    mhc = RunResult("mHC", [3.0], 3.0, held_out, 2.0, 1.0, 12)
    gain = ChainGain(("a",), (1.0,), (1.0,))
    verdict = DemoResult(plain, mhc, mhc, 2.0, 1.2, gain, gain, gain).verdict()
    assert said in verdict


def test_a_seed_gives_the_same_run_again(ran):
    batches = torch.Generator().manual_seed(TINY.seed)
    text = standard_library().train
    again = mhc_run(TINY, random_batch(text, TINY.batch, TINY.length, batches))
    for step in range(TINY.steps):
        again.step(random_batch(text, TINY.batch, TINY.length, batches), learning_rate(step, TINY))
    assert again.losses == ran[0].result.mhc.losses


def test_another_seed_gives_other_weights_and_batches():
    first, second = (plain_run(replace(TINY, seed=seed)).model.state_dict() for seed in (0, 1))
    assert not torch.equal(first["lm_head.weight"], second["lm_head.weight"])


def test_the_number_of_threads_is_put_back(ran):
    assert torch.get_num_threads() == ran[2]
