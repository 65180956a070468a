"""Passes by name: shown, timed, left in the structured trace, switched off."""

import logging

import pytest
import torch
from torch._logging._internal import trace_log

import mhc_compile
from mhc_compile import MHCConfig, MHCOptionError, logs
from mhc_compile.config import OPTIONAL_PASSES

from ..models import Stack, features


class Kept(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        self.records.append(record)


@pytest.fixture
def kept():
    handler, logger = Kept(), logs.artifact("mhc_passes")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def _compiled(**options):
    torch.manual_seed(0)
    model = Stack()
    mhc_compile.attach(model, features())
    return torch.compile(model, backend="mhc", options={"inner": "aot_eager", **options})(features())


def test_every_pass_is_shown_with_its_time(kept):
    _compiled(fusion="boundary")
    shown = [record.getMessage() for record in kept.records]
    order = ["captured", "analyze", "plan", "check_graph_breaks", "bind", "expand_streams", "fuse_boundaries"]
    first = [next(index for index, line in enumerate(shown) if line.startswith(name)) for name in order]
    assert first == sorted(first)
    assert any(line.startswith("expand_streams of ") and "ms" in line for line in shown)
    assert any("after fuse_boundaries" in line and "mhc.post_pre" in line for line in shown)


def test_the_structured_trace_gets_each_graph_and_the_report():
    handler = Kept()
    trace_log.addHandler(handler)
    try:
        _compiled()
    finally:
        trace_log.removeHandler(handler)
    metadata = [getattr(record, "metadata", {}) for record in handler.records]
    names = {entry["artifact"]["name"] for entry in metadata if "artifact" in entry}
    assert {"mhc_captured", "mhc_after_expand_streams", "mhc_report"} <= names


@pytest.mark.parametrize("name", OPTIONAL_PASSES)
def test_an_optional_pass_is_switched_off(kept, name):
    want = _compiled(fusion="boundary")
    kept.records.clear()
    torch._dynamo.reset()
    got = _compiled(fusion="boundary", disable_passes=[name])
    assert torch.allclose(want, got, rtol=1e-6, atol=1e-6)
    shown = [record.getMessage() for record in kept.records]
    assert any(line.startswith(f"{name} of ") and "switched off" in line for line in shown)
    assert any("mhc.post_pre" in line for line in shown) == (name != "fuse_boundaries")


@pytest.mark.parametrize("names", [["expand_streams"], "fuse_boundary"])
def test_only_optional_passes_can_be_switched_off(names):
    with pytest.raises(MHCOptionError, match="must be one of 'lower_native', 'fuse_boundaries'"):
        MHCConfig(disable_passes=names)
