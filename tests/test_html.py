"""The report page: well formed, self-contained, and true to the report."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile.reports.repeated_layers import folded

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.resources, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.resources += [named[key] for key in ("src", "href") if key in named]
        if tag not in VOID:
            self.open.append((tag, named.get("id")))
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        opened, _ = self.open.pop()
        assert opened == tag, f"</{tag}> closes <{opened}>"

    def handle_data(self, data):
        for tag, name in self.open:
            if name:
                self.texts[name] = self.texts.get(name, "") + data
            if tag == "td":
                self.cells[-1] += data


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(self.norm(x))


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.position = nn.Parameter(torch.zeros(4, 8))

    def forward(self, x):
        x = x * 2.0 + self.position.sin()  # <b>positions</b> & such
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def report():
    return mhc_compile.explain(Model(3), torch.ones(2, 4, 8), config=mhc_compile.MHCConfig(n_streams=3))


def test_page_shows_every_site_and_every_rejection(report, tmp_path):
    path = report.to_html(tmp_path / "report.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert len(report.sites) == 3
    rows = folded(report.sites)
    assert sum(row.count for row in rows) == 3
    for row in rows:
        at = page.cells.index(row.name)
        shown = [str(row.count), row.name, "pre", "2 × 4 × 8", "float32", row.site.location]
        assert page.cells[at - 1 : at + 5] == shown
    assert page.texts["sites"] == "3"
    assert report.rejected
    for entry in report.rejected:
        assert entry.reason.value in page.texts["left-alone"]
        assert entry.location in page.cells
    option = page.cells.index("n_streams")
    assert page.cells[option + 1] == "3"


def test_page_is_self_contained_and_escapes_source_text(report, tmp_path):
    text = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).resources == []
    assert "url(" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "&lt;b&gt;positions&lt;/b&gt; &amp; such" in text
    assert "<b>positions" not in text


class Named(nn.Module):
    """Its class and its children have names that a page might take for its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.add_module('<b title="1">&amp;', Block())
        self.inner.add_module("<script>alert(1)</script>", Block())

    def forward(self, x):
        for block in self.inner.children():
            x = block(x)
        return x


def test_page_escapes_the_names_of_modules_and_classes(tmp_path):
    report = mhc_compile.explain(type("<i>Model", (Named,), {})(), torch.ones(2, 8))
    text = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(report.sites) == 2
    for site in report.sites:
        assert "<" in site.name
        assert site.name in page.cells
    assert "<i>Model" not in text
    assert "&lt;i&gt;Model" in text
    assert not {"<script", "<b "} & {tag for tag in ("<script", "<b ") if tag in text}


def test_page_says_when_nothing_was_found(tmp_path):
    report = mhc_compile.explain(Model(1), torch.ones(2, 4, 8))
    text = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert Page(text).texts["chains"] == "0"
    assert "No residual chain of at least 2 sites was found" in text
