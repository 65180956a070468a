"""Hugging Face's Trainer with the callback: groups, scalars, checkpoints, and the warning."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import mhc_compile
from mhc_compile import MHCWarning, NotAttachedError

from .models import QUICK, Stack, features, llama, token_ids


def trainer(folder, *, callbacks, model=None, **changes):
    if model is None:
        model = llama(num_hidden_layers=1).train()
        mhc_compile.attach(model, input_ids=token_ids(), labels=token_ids())
        model.compile(backend="mhc", options=QUICK)
    arguments = TrainingArguments(**{
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "learning_rate": 1e-2, "disable_tqdm": True, "weight_decay": 0.1, "logging_steps": 1,
    } | changes)  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 8)]
    return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)


def test_groups_scalars_and_a_checkpoint_that_resumes(tmp_path):
    faster = {"callbacks": [mhc_compile.MHCCallback(mixing_rate=10)]}
    run = trainer(tmp_path, **faster, save_strategy="steps", save_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MHCWarning)
        run.train()
    ours = mhc_compile.parameters(run.model)
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert {name.rsplit(".")[-1]: decays[id(p)] for name, p in ours.items()} == {"phi": 0.1, "scale": 0.0, "bias": 0.0}
    groups = zip(run.lr_scheduler.base_lrs, run.optimizer.param_groups, strict=True)
    rates = {id(parameter): rate for rate, group in groups for parameter in group["params"]}
    assert {rates.pop(id(p)) for p in ours.values()} == {10 * 1e-2}
    assert len(rates) == len([*run.model.parameters()]) - len(ours)
    assert {*rates.values()} == {1e-2}
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert 0 < logged[0]["mhc_moved"] < logged[1]["mhc_moved"]
    assert all(entry["mhc_gain_forward"] == pytest.approx(1, abs=1e-5) for entry in logged)
    trained = {name: p.detach().clone() for name, p in ours.items()}
    loaded = mhc_compile.from_pretrained(AutoModelForCausalLM, tmp_path / "checkpoint-2")
    assert all(torch.equal(p, trained[name]) for name, p in mhc_compile.parameters(loaded).items())
    again = trainer(tmp_path, **faster)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(p, trained[name]) for name, p in mhc_compile.parameters(again.model).items())


def test_without_the_callback_the_decay_of_scale_is_warned_of(tmp_path):
    run = trainer(tmp_path, callbacks=[])
    optimizer = run.create_optimizer()
    with pytest.warns(MHCWarning, match=r"weight decay 0.1 pulls 2 mHC parameters .*MHCCallback"):
        optimizer.step()


def test_a_mixing_that_stands_still_is_warned_of_once():
    model = Stack()
    mhc_compile.attach(model, features())
    callback = mhc_compile.MHCCallback(warn_after=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 3):
            callback.on_step_end(None, SimpleNamespace(global_step=step), None, model=model)
    assert [str(one.message)[:59] for one in caught] == ["after 2 steps no mixing coefficient has moved by more than "]
    with torch.no_grad():
        model.blocks[0].mhc.mlp.bias += 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mhc_compile.MHCCallback(warn_after=2).on_step_end(None, SimpleNamespace(global_step=2), None, model=model)


def test_a_model_that_is_not_attached_is_refused(tmp_path):
    with pytest.raises(NotAttachedError, match="attach"):
        trainer(tmp_path, callbacks=[mhc_compile.MHCCallback()], model=llama())
