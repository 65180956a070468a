"""The tests here need a C++ compiler, as `g++` or `clang++`; without one only the fallback is there to test."""

import pytest
import torch
from mhc_compile.kernels.cpu import build


@pytest.fixture
def compiled() -> None:
    """The operators can be compiled here."""
    reason = build.why_not(4, torch.float32)
    if reason:
        pytest.skip(reason)
