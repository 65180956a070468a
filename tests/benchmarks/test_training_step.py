"""The training-step benchmark counts what is saved, notices another function, and goes on after a failure."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from benchmarks import training_report, training_step
from benchmarks.llama import PLAIN, Setting, layers_that_fit
from benchmarks.record import Options, Record
from benchmarks.training_step import Case, Measured

SETTING = Setting(64, 2, 2, 8, vocabulary=32, dtype="float32")
PLAN = training_step.Plan((SETTING,), "aot_eager", 2, SETTING, ())


def test_saved_bytes_leave_out_parameters_and_count_a_storage_once():
    layer = nn.Linear(6, 5, bias=False)
    value = torch.randn(4, 6, requires_grad=True)
    # Linear saves its input and its weight, the product saves both factors: one storage of 4 x 5 floats.
    amount, _ = training_step.saved_bytes(layer, lambda: (lambda out: (out * out).sum())(layer(value)))
    assert amount == 4 * (4 * 6 + 4 * 5)


def test_the_deepest_setting_fills_the_memory_that_is_free(monkeypatch):
    wide = Setting(4096, 4, 2, 4096)
    gib = 2**30
    # Weights, gradients and moments of a layer: 1.6 GiB; activations: 2.8 GiB.
    assert [layers_that_fit(wide, size * gib) for size in (1, 24, 80, 139)] == [1, 3, 13, 23]
    assert layers_that_fit(Setting(2048, 4, 2, 4096), 80 * gib) > 2 * layers_that_fit(wide, 80 * gib)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139 * gib, 141 * gib))
    plan = training_step.plan_for(Options(device="cuda"))
    assert plan.settings[-1].layers == 23


def measured(loss, seconds=1.0, peak=None, saved=10):
    return Measured([loss, loss], [seconds] * 3, 2.0, peak, saved)


@pytest.fixture
def outcomes(monkeypatch, tmp_path):
    """Run a setting with given outcomes and return the record."""

    def run(found):
        def measure(case, setting, plan, device):
            outcome = found[case.name]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        monkeypatch.setattr(training_step, "measure", measure)
        record = Record("training_step", tmp_path / "training_step.json")
        only = tuple(name for name in found if name != PLAIN)
        training_step.measure_setting(SETTING, PLAN, Options("cpu", only=only), record)
        record.content["environment"] = {"device": "cpu"}
        return record.content

    return run


def test_ratios_are_to_the_plain_model_of_the_same_run(outcomes):
    content = outcomes(
        {PLAIN: measured(1.0, 2.0, saved=10), "site/none": measured(1.0, 3.0, saved=15), "boundary/auto": measured(1.0)}
    )
    (table,) = training_report.tables(content)
    assert [row[3] for row in table.rows] == ["–", "-50.0%", "+50.0%"]
    assert [row[-1] for row in table.rows] == ["1.00", "1.00", "1.50"]
    assert table.best == frozenset((1,))
    assert [row["fusion"] for row in content["rows"]] == [PLAIN, "boundary", "site", PLAIN]


def test_another_function_is_a_failure(outcomes):
    content = outcomes({PLAIN: measured(1.0), "site/none": measured(1.001)})
    assert [entry["why"][:33] for entry in content["failures"]] == ["its first loss is 1.001, the plai"]
    (table,) = training_report.tables(content)
    assert [row[0] for row in table.rows] == ["plain", "site ✗"]
    assert table.best == frozenset()


def test_a_step_that_compiled_is_a_failure(outcomes):
    late = dataclasses.replace(measured(1.0), compiled=2)
    content = outcomes({PLAIN: measured(1.0), "site/none": late, "boundary/auto": measured(1.0)})
    assert [row["problems"] != [] for row in content["rows"]] == [False, False, True, False]
    assert [entry["why"] for entry in content["failures"]] == ["something was compiled in the steps that were timed"]


def test_one_case_that_breaks_leaves_the_others(outcomes):
    broken = {"boundary/none": torch.OutOfMemoryError("x"), "site/auto": ValueError("first line\nsecond")}
    content = outcomes({PLAIN: measured(1.0), **broken, "site/none": measured(1.0)})
    assert [row["fusion"] for row in content["rows"]] == [PLAIN, "site", PLAIN]
    assert [entry["why"] for entry in content["skipped"]] == ["out of device memory"]
    assert [entry["why"] for entry in content["failures"]] == ["ValueError: first line"]


def test_a_rewritten_model_saves_more_and_computes_the_same():
    plain = training_step.measure(training_step.BASELINE, SETTING, PLAN, "cpu")
    ours = training_step.measure(Case("site", "none"), SETTING, PLAN, "cpu")
    assert ours.losses[0] == pytest.approx(plain.losses[0], rel=training_step.allowed_loss_error("float32"))
    # Two sites a layer keep four streams each of 16 tokens; sharing storages may save at most one of them.
    streams = 2 * SETTING.layers * 4 * SETTING.tokens * SETTING.width * 4
    assert ours.saved_bytes - plain.saved_bytes > 0.7 * streams
