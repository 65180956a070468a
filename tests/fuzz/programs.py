"""Random residual programs as Python source, with the number of sites that each line truly has.

A program is the forward of a module with a fixed toolbox: mixers a to d, norms n and m, projections p and q, a learned
`gain` per feature and a learned `damp`. Features lie last ([batch, tokens, 8]) or, with convolutions, first.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

WIDTH = 8
MIXERS, NORMS, PROJECTIONS = "abcd", "nm", "pq"

HEADER = """\
import torch
from torch.nn import functional as F
from tests.fuzz.programs import {toolbox}

class Program({toolbox}):
    def forward(self, inputs, others):
        x = self.stem(inputs)
        y = self.stem(others)
        out = []
"""


class Toolbox(nn.Module):
    """Features last."""

    shape = (2, 3, WIDTH)

    def __init__(self) -> None:
        super().__init__()
        for name in ("stem", "readout", *MIXERS, *PROJECTIONS):
            self.add_module(name, self.mixer())
        for name in NORMS:
            self.add_module(name, self.norm())
        self.gain = nn.Parameter(0.5 + torch.rand(self.per_feature()))
        self.table = nn.Parameter(torch.rand(self.shape[1:]))
        self.damp = nn.Parameter(torch.tensor([0.5]))

    def mixer(self) -> nn.Module:
        return nn.Linear(WIDTH, WIDTH)

    def norm(self) -> nn.Module:
        return nn.LayerNorm(WIDTH)

    def per_feature(self) -> tuple[int, ...]:
        return (WIDTH,)

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        """Mix tokens, with no weights."""
        return torch.softmax(value @ value.transpose(-1, -2), -1) @ value


class FeaturesFirst(Toolbox):
    """Features first: [batch, 8, tokens]."""

    shape = (2, WIDTH, 5)

    def mixer(self) -> nn.Module:
        return nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def norm(self) -> nn.Module:
        return nn.GroupNorm(2, WIDTH)

    def per_feature(self) -> tuple[int, ...]:
        return (WIDTH, 1)

    def attend(self, value: torch.Tensor) -> torch.Tensor:
        return value @ torch.softmax(value.transpose(-1, -2) @ value, -1)


@dataclass
class Program:
    """A program.

    Attributes:
        toolbox: "Toolbox" or "FeaturesFirst".
        lines: the body of its forward.
        sites: for each line, how many sites it holds; None if either is right.
    """

    toolbox: str
    lines: list[str] = field(default_factory=list)
    sites: list[int | None] = field(default_factory=list)

    def add(self, line: str, sites: int | None = 0) -> int:
        self.lines.append(line)
        self.sites.append(sites)
        return len(self.lines) - 1

    @property
    def source(self) -> str:
        body = "".join(f"        {line}\n" for line in self.lines)
        return HEADER.format(toolbox=self.toolbox) + body + "        return self.readout(x), *out\n"

    @property
    def expected(self) -> dict[int, int | None]:
        """The number of sites by line number in the source."""
        first = HEADER.count("\n") + 1
        return {first + index: count for index, count in enumerate(self.sites) if count != 0}

    def build(self, file: str) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
        """Return the module and its inputs; `file` is what its source is called."""
        linecache.cache[file] = (len(self.source), None, self.source.splitlines(keepends=True), file)
        names: dict[str, Any] = {"__name__": "program"}
        exec(compile(self.source, file, "exec"), names)
        torch.manual_seed(0)
        model = names["Program"]()
        generator = torch.Generator().manual_seed(1)
        first, second = (torch.randn(model.shape, generator=generator) for _ in range(2))
        return model, (first, second)


def _branch(draw: Any, value: str, kinds: tuple[str, ...] = ()) -> str:
    """Draw a branch: what is computed from a value, mixing it."""
    first, second = (draw(st.sampled_from(MIXERS)) for _ in range(2))
    norm = draw(st.sampled_from(NORMS))
    read = draw(st.sampled_from((value, f"self.{norm}({value})")))
    forms = {
        "mixer": f"self.{first}({read})",
        "mlp": f"self.{second}(torch.tanh(self.{first}({read})))",
        "gated": f"self.{first}({read}) * torch.sigmoid(self.{second}({read}))",
        "attention": f"self.{second}(self.attend(self.{first}({read})))",
        "tokens": f"self.attend({read})",
        "dropout": f"F.dropout(self.{first}({read}), 0.0)",
        "layer scale": f"self.gain * self.{first}({read})",
        "factor": f"0.5 * self.{first}({read})",
        "exit norm": f"self.{norm}(self.{first}({value}))",
        "views": f"self.{first}({read}).flatten(1).view({value}.shape)",
        "permuted": f"self.{first}({read}).transpose(1, 2).contiguous().transpose(1, 2)",
        "cast": f"self.{first}({read}.to(torch.float64).to({value}.dtype))",
    }
    return forms[draw(st.sampled_from(kinds or tuple(forms)))]


# How a stream may be changed, as (line, number of sites); {B} and {D} are branches of x, {N} a norm, {P} a projection.
_SITES = [
    ("x = x + {B}", 1),
    ("x = {B} + x", 1),
    ("x = torch.add(x, {B}, alpha=0.5)", 1),
    ("x = torch.add({B}, x, alpha=0.5)", 1),
    ("x = torch.addcmul(x, {B}, self.gain)", 1),
    ("x = self.{N}(x + {B})", 1),
    ("x = torch.relu(x + {B})", 1),
    ("x = x + {B} + {D}", 2),
    ("x = x + ({B} + {D})", 1),
    ("x = 0.7 * x + {B}", 1),
    ("x = x * self.damp + {B}", 1),
    ("x = x * self.gain + {B}", None),
    ("x = x.to(torch.float64) + {B}; x = x.to(inputs.dtype)", 1),
    ("x = F.dropout(x, 0.0) + {B}", 1),
]
_CARRIERS = [
    "x = torch.relu(x)",
    "x = torch.nn.functional.relu(x, inplace=True)",
    "x = self.{N}(x)",
    "x = 1.5 * x",
    "x = self.gain * x",
    "x = x.clone()",
    "x = F.dropout(x, 0.0)",
    "x = x.to(torch.float64).to(inputs.dtype)",
]
_READERS = ["out.append(x)", "out.append(self.{M}(x))", "out.append(x.mean(1))", "out.append(2 * self.{N}(x))"]
# What ends a stream, or has the looks of a residual and is none.
_OTHERS = [
    "x = torch.tanh(self.{M}(x))",
    "x = x + x * torch.sigmoid(self.{M}(x))",
    "x = x + torch.relu(x)",
    "x = x + self.table",
    "x = x + 1.0",
    "x = self.{M}(x) + self.{P}(x)",
    "x = x + y",
    "x = x + self.{M}(y)",
]


@st.composite
def programs(draw: Any) -> Program:
    """Draw a program of one to six steps."""
    program = Program(draw(st.sampled_from(("Toolbox", "FeaturesFirst"))))
    shortcut: int | None = None  # a projection shortcut that counts if its stream goes on

    def fill(text: str) -> str:
        for key, choices in (("{N}", NORMS), ("{M}", MIXERS), ("{P}", PROJECTIONS)):
            if key in text:
                text = text.replace(key, draw(st.sampled_from(choices)))
        for key in ("{B}", "{D}"):
            if key in text:
                text = text.replace(key, _branch(draw, "x"))
        return text

    for _ in range(draw(st.integers(1, 6))):
        step = draw(st.sampled_from(_STEPS))
        if step in _LAST_ONLY and program.toolbox != "Toolbox":
            continue
        if step in _GO_ON and shortcut is not None:
            program.sites[shortcut], shortcut = 1, None
        if step == "site":
            text, count = draw(st.sampled_from(_SITES))
            program.add(fill(text), count)
        elif step == "in place":
            program.add("h = " + _branch(draw, "x", ("mixer", "mlp", "gated", "factor", "layer scale")))
            program.add(draw(st.sampled_from(("h += x", "h.add_(x)"))), 1)
            program.add("x = h")
        elif step == "pre-activation":
            program.add(fill("h = self.{M}(F.relu(x, inplace=True))"))
            program.add("x = x + h", 1)
        elif step == "shared norm":
            program.add(fill("h = self.{N}(x)"))
            program.add("x = x + " + " + ".join(_branch(draw, "h", ("mixer", "mlp")) for _ in range(2)), 2)
        elif step == "nested":
            program.add(fill("h = self.{M}(self.{N}(x))"))
            for _ in range(draw(st.integers(1, 2))):
                program.add("h = h + " + _branch(draw, "h"), 1)
            program.add(fill("x = x + self.{M}(h)"), 1)
        elif step == "group":
            program.add("h = " + draw(st.sampled_from(("x", "x", "self.n(x)"))) + " + " + _branch(draw, "x"), 1)
            for _ in range(draw(st.integers(1, 2))):
                program.add("h = h + " + _branch(draw, "h"), 1)
            program.add(fill("x = x + self.{M}(h)"), 1)
        elif step == "frozen":
            program.add(fill("with torch.no_grad(): x = x + {B}"), 1)
        elif step == "flattened":
            program.add("x = x.flatten(0, 1)")
            program.add("x = x + " + _branch(draw, "x", ("mixer", "mlp", "gated", "tokens", "exit norm")), 1)
            program.add("x = x.unflatten(0, (2, 3))")
        elif step == "transposed":
            program.add("x = x.transpose(0, 1)")
            program.add("x = x + " + _branch(draw, "x", ("mixer", "mlp", "gated", "tokens", "exit norm")), 1)
            program.add("x = x.transpose(0, 1)")
        elif step == "carrier":
            program.add(fill(draw(st.sampled_from(_CARRIERS))))
        elif step == "reader":
            program.add(fill(draw(st.sampled_from(_READERS))))
        elif step == "dead":
            program.add(fill("dead = x + {B}"), None)
            if shortcut is not None:
                program.sites[shortcut], shortcut = None, None
        elif step == "other stream":
            program.add(fill("y = y + {B}").replace("(x)", "(y)").replace("x.", "y."), 1)
            program.add("out.append(y)")
        elif step == "alias":
            program.add("view = x.view(x.shape)")
            program.add(f"x += self.{draw(st.sampled_from(MIXERS))}(x.detach())", None)
            program.add("out.append(view)")
        elif step == "other":
            program.add(fill(draw(st.sampled_from(_OTHERS))))
            shortcut = None
        elif step == "shortcut":
            shortcut = program.add(fill("x = self.{P}(x) + self.{M}(torch.relu(self.{M}(x)))"))
    return program


_STEPS = (
    *("site",) * 6, "in place", "pre-activation", "shared norm", "nested", "group", "frozen", "flattened",
    "transposed", "carrier", "carrier", "reader", "dead", "other stream", "alias", "other", "other", "shortcut",
)  # fmt: skip
_LAST_ONLY = ("flattened", "transposed")
_GO_ON = ("site", "in place", "shared norm", "nested", "group", "frozen", "pre-activation", *_LAST_ONLY)
