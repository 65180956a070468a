"""What the tests of the kernels share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(device: str) -> Iterator[None]:
    """Operators take the Triton kernels."""
    from mhc_compile.kernels.dispatch import choosing

    with choosing("triton"):
        yield
