"""The report: text and dictionary."""

import json
import os
import pathlib
import re
import subprocess
import sys

import expecttest
import pytest
import torch
from mhc_compile.passes.residual import Reason

import mhc_compile
from mhc_compile import MHCConfig

from .models import QUICK, Stack, features, llama, token_ids

ROOT = pathlib.Path(__file__).resolve().parent.parent


class TestText(expecttest.TestCase):
    def test_table(self):
        report = mhc_compile.explain(Stack(depth=1), features())
        text = "\n".join(line.rstrip() for line in str(report).splitlines())
        # The lines of models.py may move; what they say may not.
        text = re.sub(r"models\.py:\d+", "models.py:N", text)
        self.assertExpectedInline(
            text,
            """\
Stack: 2 sites in 1 chain, 4 streams on the manifold 'sinkhorn', init='preserve'
parameters: 3,395 + 6,198 (182.56%)
chain 1: 2 sites, from tests/models.py:N  hidden = self.stem(features)
┏━━━━━━━━━━━━━━━━━━━━┳━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┓
┃ site               ┃ norm ┃ stream       ┃ source                                                                  ┃
┡━━━━━━━━━━━━━━━━━━━━╇━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┩
│ blocks.0.mhc.mixer │ pre  │ 5x32 float32 │ tests/models.py:N  hidden = hidden +                                  │
│                    │      │              │ self.dropout(self.mixer(self.norm1(hidden)))                            │
│ blocks.0.mhc.mlp   │ pre  │ 5x32 float32 │ tests/models.py:N  return hidden +                                    │
│                    │      │              │ self.dropout(torch.tanh(self.mlp(self.norm2(hidden))))                  │
└────────────────────┴──────┴──────────────┴─────────────────────────────────────────────────────────────────────────┘""",
        )


def test_the_report_is_json_and_names_everything():
    report = mhc_compile.explain(llama(), input_ids=token_ids())
    content = json.loads(json.dumps(report.to_dict()))
    assert [site["name"] for site in content["chains"][0]["sites"]] == [site.name for site in report.sites]
    assert content["config"]["n_streams"] == 4
    assert content["parameters_added"] == report.parameters_added > 0
    assert {entry["reason"] for entry in content["rejected"]} == {Reason.ROTATION.value, Reason.NUMBER.value}
    assert all("modeling_llama.py:" in site["location"] for site in content["chains"][0]["sites"])


def test_explain_changes_nothing_and_needs_no_residual():
    model = Stack()
    keys = list(model.state_dict())
    mhc_compile.explain(model, features())
    assert list(model.state_dict()) == keys
    model(features())
    empty = mhc_compile.explain(torch.nn.Linear(32, 32), features())
    assert not empty.sites
    assert "0 sites" in str(empty)


def test_a_report_grows_with_graphs_but_not_with_sites():
    model = Stack()
    mhc_compile.attach(model, features())
    compiled = torch.compile(model, backend="mhc", options=QUICK, dynamic=False)
    compiled(features(5))
    compiled(features(3))
    report = mhc_compile.report(compiled)
    assert len(report.sites) == 4
    assert len(report.graphs) >= 2


def test_no_report_says_so():
    with pytest.raises(mhc_compile.NotAttachedError, match="explain"):
        mhc_compile.report(Stack())


def test_a_graph_break_outside_the_stream_is_in_the_report():
    class Breaks(Stack):
        def forward(self, values):
            hidden = super().forward(values)
            torch._dynamo.graph_break()
            return hidden * 2

    report = mhc_compile.attach(Breaks(), features())
    assert "graph_break" in str(report)


def test_torch_logs_print_the_report_and_the_graph(tmp_path):
    script = (
        "import torch; from tests.models import QUICK, Stack, features;"
        "torch.compile(Stack(), backend='mhc', options=QUICK)(features())"
    )
    environment = {**os.environ, "TORCH_LOGS": "mhc_report,mhc_passes"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "4 sites in 1 chain" in done.stderr
    assert "torch.ops.mhc.pre.default" in done.stderr or "mhc.pre" in done.stderr


def test_options_are_in_the_report():
    report = mhc_compile.explain(Stack(), features(), config=MHCConfig(n_streams=2, manifold="identity"))
    assert "2 streams on the manifold 'identity'" in str(report)
