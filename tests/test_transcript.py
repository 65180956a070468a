"""Twenty things that a newcomer tries, and every word that comes back: the golden file is read like a page.

`python -m tests.test_transcript` writes it anew; look at what changes.
"""

import contextlib
import io
import os
import re
import textwrap
import warnings
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "transcript.txt"

SETUP = """
import copy, torch, mhc_compile
from torch import nn
from tests.models import BreaksBetween, Stack, features, llama, token_ids
x, ids = features(), token_ids()
quick = {"inner": "eager"}
def attached(made=Stack):
    model = made()
    mhc_compile.attach(model, *([ids] if made is llama else [x]))
    return model
def command(*arguments):
    from typer.testing import CliRunner
    from mhc_compile.__main__ import app
    result = CliRunner().invoke(app, list(arguments))
    print(result.output.rstrip())
    print("exit status", result.exit_code)
"""

TRIES = (
    "model = attached(); model(x)",
    "model = attached(); model.compile(backend='mhc', options=quick); copy.deepcopy(model)(x)",
    "model = attached(); torch.func.functional_call(model, dict(model.named_parameters()), (x,))",
    "model = attached(); torch.func.grad(lambda x: model(x).sum())(x)",
    "model = attached(); torch.vmap(model)(x)",
    "model = attached(); torch.compiler.set_stance('force_eager'); torch.compile(model, backend='mhc')(x)",
    "model = attached(); nn.Sequential(model, nn.ReLU())(x)",
    "model = attached(); model.blocks[0](x)",
    "model = attached(llama); torch.compile(model, backend='mhc').generate(ids, max_new_tokens=1)",
    "model = attached(); torch.compile(model, backend='eager')(x)",
    "model = attached()\n"
    "compiled = torch.compile(model, backend='mhc', options=quick, dynamic=False)\n"
    "for rows in range(2, 12): compiled(x[:1].expand(rows, -1))",
    "model = attached(); torch.export.export(model, (x,))",
    "mhc_compile.attach(llama(), input_id=ids)",
    "mhc_compile.attach(llama(), input_ids=ids, n_stream=2)",
    "mhc_compile.attach(llama(), input_ids=ids, n_streams=9)",
    "mhc_compile.attach(nn.Linear(2, 2), torch.ones(2, 2))",
    "torch.compile(BreaksBetween(), backend='mhc', options=quick)(x)",
    "torch.compile(Stack(), backend='mhc', options={'manifold': 'sinkhorn_knopp'})(x)",
    "model = Stack()\n"
    "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
    "torch.compile(model, backend='mhc', options=quick)(x).sum().backward(); optimizer.step()",
    "mhc_compile.param_groups(Stack(), weight_decay=0.1)",
    "command('explain', 'meta-llama/Llama-3.1-8B')",
    "command('explain', 'lama')",
    "command('explain', 'tests.models:no_such_model')",
    "command('inspect', 'no_such_folder')",
)


def transcript():
    """Run every try in a fresh compiler and return what a person would see."""
    import torch

    parts = []
    for code in TRIES:
        torch._dynamo.reset()
        torch.manual_seed(0)
        printed = io.StringIO()
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", category=UserWarning)
            scope = {"__name__": "transcript"}
            try:
                exec(SETUP, scope)
                exec(code, scope)
                said = printed.getvalue()
            except Exception as error:
                said = f"{printed.getvalue()}{type(error).__name__}: {error}"
            finally:
                torch.compiler.set_stance("default")
        said = "".join(f"{w.category.__name__}: {w.message}\n" for w in caught if "mhc" in str(w.message)) + said
        parts.append(textwrap.indent(code, ">>> ") + "\n" + textwrap.fill(_steady(said), 100))
    return "\n\n".join(parts) + "\n"


def _steady(said):
    said = re.sub(r"(\n\n)?Set TORCHDYNAMO_VERBOSE.*|\n\nfrom user code.*", "", said, flags=re.DOTALL)
    said = re.sub(r"/\S*/(?=[\w.]+\.py)", "", said)
    return re.sub(r"(\.py\"?(:|, line ))\d+", r"\1N", said).strip()


def test_the_transcript_is_the_golden_file():
    assert transcript() == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    GOLDEN.write_text(transcript(), encoding="utf-8")
