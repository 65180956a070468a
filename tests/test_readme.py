"""Every snippet of the README runs, one after the other, as a reader would run them."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def snippets():
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_snippets_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "readme"}
    found = snippets()
    assert len(found) == 10
    for number, code in enumerate(found):
        # What Inductor compiles is tested elsewhere, and would take minutes here.
        quick = code.replace('backend="mhc"', 'backend="mhc", options={"inner": "eager"}')
        quick = quick.replace("attach(model, input_ids=ids", "attach(model, sinkhorn_iters=2, input_ids=ids")
        quick = quick.replace("num_hidden_layers=2", "num_hidden_layers=1")
        exec(compile(quick, f"README.md, snippet {number}", "exec"), scope)
    assert (tmp_path / "mixing.html").exists()
    program, model = scope["program"], scope["loaded"]
    ids = torch.randint(0, 256, (3, 7))
    wanted = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(program.module()(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-5)
    assert scope["loaded"].model.layers[0].mhc.self_attn.phi.requires_grad
