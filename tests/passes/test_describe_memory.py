"""What TORCH_LOGS=mhc_memory prints."""

import logging
import re

import expecttest
import pytest
import torch
from torch import nn

from mhc_compile import logs

from ..models import Stack, features


class Tiny(nn.Module):
    """Sites on one short source line."""

    def __init__(self, sites=5):
        super().__init__()
        self.stem, self.readout = nn.Linear(32, 32), nn.Linear(32, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(sites))
        self.mixers = nn.ModuleList(nn.Linear(32, 32) for _ in range(sites))

    def forward(self, features):
        hidden = self.stem(features)
        for norm, mix in zip(self.norms, self.mixers, strict=True):
            hidden = hidden + mix(norm(hidden))
        return self.readout(hidden)


@pytest.fixture
def shown():
    """Collect the log's messages."""
    messages = []

    class Collect(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger, handler = logs.artifact("mhc_memory"), Collect()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


def _compiled(**options):
    torch._dynamo.reset()
    model = torch.compile(Tiny(), backend="mhc", options={"inner": "aot_eager", **options}, dynamic=False)
    model(features()).sum().backward()


def test_table(shown):
    _compiled(recompute=3)
    (text,) = shown
    # The lines of this file may move; what they say may not.
    text = re.sub(r"passes/test_describe_memory\.py:\d+", "this.py:N", text)
    expecttest.assert_expected_inline(
        text,
        """\
saved for the backward: 38 tensors, 14.6 KiB
   5 x float32 [5, 32]     3.1 KiB  aten.native_layer_norm  this.py:N  hidden = hidden + mix(norm(hidden))
   5 x float32 [5, 32]     3.1 KiB  aten.addmm              this.py:N  hidden = hidden + mix(norm(hidden))
   1 x float32 [5, 4, 32]  2.5 KiB  mhc.post                this.py:N  hidden = hidden + mix(norm(hidden))
   5 x float32 [5, 25]     2.4 KiB  mhc.measure             this.py:N  hidden = hidden + mix(norm(hidden))
   5 x float32 [5, 4, 4]   1.6 KiB  mhc.measure             this.py:N  hidden = hidden + mix(norm(hidden))
   1 x float32 [5, 32]       640 B  aten.addmm              this.py:N  hidden = self.stem(features)
   1 x float32 [5, 32]       640 B  aten.add.Tensor         this.py:N  hidden = hidden + mix(norm(hidden))
   5 x float32 [5, 4]        400 B  mhc.measure             this.py:N  hidden = hidden + mix(norm(hidden))
  10 x float32 [5, 1]        200 B  aten.native_layer_norm  this.py:N  hidden = hidden + mix(norm(hidden))
computed again in the backward: 20 tensors, 15.7 KiB
  3 x float32 [5, 4, 32]  7.5 KiB  mhc.post         this.py:N  hidden = hidden + mix(norm(hidden))
  5 x float32 [5, 32]     3.1 KiB  mhc.collapse     this.py:N  hidden = hidden + mix(norm(hidden))
  1 x float32 [5, 4, 32]  2.5 KiB  aten.cat         this.py:N  hidden = self.stem(features)
  5 x float32 [5, 4, 4]   1.6 KiB  mhc.collapse     this.py:N  hidden = hidden + mix(norm(hidden))
  1 x float32 [5, 1, 32]    640 B  aten.zeros_like  this.py:N  hidden = self.stem(features)
  5 x float32 [5, 4]        400 B  mhc.collapse     this.py:N  hidden = hidden + mix(norm(hidden))""",
    )


def test_nothing_is_computed_again_without_a_policy(shown):
    _compiled(recompute="none")
    assert "computed again in the backward: 0 tensors, 0 B" in shown[0]
    assert re.search(r"4 x float32 \[5, 4, 32\] .* mhc\.post", shown[0])


def test_inference_and_backends_without_a_partitioner_show_nothing(shown):
    with torch.no_grad():
        torch.compile(Stack(), backend="mhc", options={"inner": "aot_eager"})(features())
    torch._dynamo.reset()
    torch.compile(Stack(), backend="mhc", options={"inner": "eager"})(features()).sum().backward()
    assert not shown


def test_a_log_that_is_off_changes_nothing(monkeypatch):
    from mhc_compile.dynamo import inner

    monkeypatch.setattr(inner, "describe_memory", lambda *_: pytest.fail("described"))
    _compiled(recompute=3)
