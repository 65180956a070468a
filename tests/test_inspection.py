"""What `inspect` sees of a mixing, before and after it has moved, and how equal layers fold."""

import dataclasses
import re

import pytest
import torch
from typer.testing import CliRunner

import mhc_compile
from mhc_compile.__main__ import app
from mhc_compile.reports.repeated_layers import folded

from .models import Stack, features, llama, token_ids


def moved(model, *inputs):
    mhc_compile.attach(model, *inputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mhc_compile.parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_a_start_stands_still_and_a_move_is_seen(tmp_path):
    model = Stack()
    mhc_compile.attach(model, features())
    start = mhc_compile.inspect(model, features())
    assert start.still
    assert "still computes what the plain one would" in str(start)
    assert [site.similarity for site in start.sites] == pytest.approx([1.0] * 4)
    assert [max(range(4), key=site.pre.__getitem__) for site in start.sites] == [0, 1, 2, 3]
    with torch.no_grad():
        model.blocks[1].mhc.mlp.bias[4] += 1.0
        model.blocks[0].mhc.mixer.bias[1] += 2.0
    found = mhc_compile.inspect(torch.compile(model), features())
    assert not found.still
    assert [site.moved > 0.1 for site in found.sites] == [True, False, False, True]
    assert found.sites[3].post[0] == pytest.approx(2 / (1 + torch.e**-1))
    page = found.to_html(tmp_path / "page.html").read_text()
    assert all(site.name in page for site in found.sites)
    assert "still computes" not in page
    assert "<img" not in page
    assert found.to_png(tmp_path / "picture.png").stat().st_size > 10_000


def test_streams_drift_apart_behind_a_site_that_writes_unevenly():
    model = moved(Stack(), features())
    similarity = [site.similarity for site in mhc_compile.inspect(model, features()).sites]
    assert similarity[0] == pytest.approx(1.0)
    assert similarity[1] < 0.999


def test_the_command_inspects_a_saved_folder(tmp_path):
    mhc_compile.save_pretrained(moved(llama(num_hidden_layers=1), token_ids()), tmp_path)
    done = CliRunner().invoke(app, ["inspect", str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert "model.layers.0.mhc.self_attn" in done.stdout
    assert (tmp_path / "page.html").exists()


def test_equal_layers_fold_and_others_do_not():
    report = mhc_compile.explain(llama(num_hidden_layers=5), token_ids())
    rows = folded(report.sites)
    assert [(row.name, row.count) for row in rows] == [
        ("model.layers.0–4.mhc.self_attn", 5),
        ("model.layers.0–4.mhc.mlp", 5),
    ]
    assert re.search(r"model\.layers\.0–4\.mhc\.mlp", str(report))
    sites = [
        dataclasses.replace(site, norm="post") if ".2." in site.name and site.name.endswith("mlp") else site
        for site in report.sites
    ]
    assert [row.name.removeprefix("model.layers.") for row in folded(sites)] == [
        f"{layers}.mhc.{part}" for layers in ("0–1", "2", "3–4") for part in ("self_attn", "mlp")
    ]
    assert sum(row.count for row in folded(sites)) == len(sites)


def test_sites_that_match_nothing_are_an_error():
    made = CliRunner().invoke(app, ["explain", "tests.models:named_example", "--sites", "*.nothing"])
    assert made.exit_code == 1
    assert "matches none of the 4 sites: blocks.0–1.mhc.mixer, blocks.0–1.mhc.mlp" in made.stderr
