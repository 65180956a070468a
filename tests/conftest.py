import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The workers share the cores already: more threads in each, and processes that wait to compile, are only in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Dynamo collects garbage after each compilation; the tests make enough to leave that to the thresholds below.
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")

import pytest
import torch

from . import quick_interpreter

# Tracing makes millions of small objects, and the default collects after every 700.
gc.set_threshold(100_000, 50, 100)

# Without a GPU the kernels run in Triton's interpreter. The variable is read when a kernel is first imported, which
# any test module may do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    quick_interpreter.install()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Each test starts without compiled code, from the same seed."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
