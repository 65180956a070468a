"""Where there is no GPU, the kernels run in Triton's interpreter.

The variable is read when the kernels are first imported, which nothing does before a test here asks for them.
"""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(device: str) -> Iterator[None]:
    """Operators take the Triton kernels."""
    from mhc_compile.kernels.dispatch import choosing

    with choosing("triton"):
        yield
