"""The report: what was rewritten, what was not and why. As text, dictionary or HTML."""

from __future__ import annotations

import html
import io
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..config import MHCConfig
from ..kernels.costs.fusion_choice import FusionChoice
from ..kernels.manifolds import MANIFOLDS
from ..memory import MEMORY
from ..passes.native import NativeRow
from ..passes.residual import Chain, Reason, Rejection, Site
from ..planning.nothing_found import rejected_by_reason
from ..planning.sites import Plan
from .pipeline_prediction import PipelinePrediction
from .prediction import Prediction
from .repeated_layers import folded

if TYPE_CHECKING:
    from rich.table import Table

_MOST_ROWS = 40


@dataclass(frozen=True)
class GraphReport:
    """One captured graph.

    Attributes:
        function: the frame's function.
        nodes: number of nodes that Dynamo captured.
        chains: what was rewritten.
        rejected: what was not.
        break_reason: why the graph ended before its function did, if it did.
        fusion: which operators its sites run and why; None for a graph that was not compiled, or has no site.
        cuts: why the streams that enter the graph were averaged before it, and expanded again in it.
        native: sites and readouts of streams that the model carries itself, which our operators run.
    """

    function: str
    nodes: int
    chains: tuple[Chain, ...]
    rejected: tuple[Rejection, ...]
    break_reason: str | None = None
    fusion: FusionChoice | None = None
    cuts: tuple[str, ...] = ()
    native: tuple[NativeRow, ...] = ()


@dataclass
class Report:
    """What happened to one model, over all graphs captured from it.

    `str(report)` is a table; `to_dict()` is JSON; `to_html(path)` writes one page.
    """

    model: str
    config: MHCConfig
    graphs: list[GraphReport] = field(default_factory=list)
    parameters_before: int = 0
    prediction: Prediction | None = None
    pipeline: PipelinePrediction | None = None

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Every chain, once: a graph compiled again (other shapes, eval mode) adds nothing."""
        seen: dict[tuple[str, ...], Chain] = {}
        for graph in self.graphs:
            for chain in graph.chains:
                seen.setdefault(tuple(site.name for site in chain.sites), chain)
        return tuple(seen.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every rewritten site, once."""
        seen: dict[str, Site] = {}
        for chain in self.chains:
            for site in chain.sites:
                seen.setdefault(site.name, site)
        return tuple(seen.values())

    @property
    def native(self) -> tuple[NativeRow, ...]:
        """Every site and readout of streams that the model carries itself, once."""
        return tuple(dict.fromkeys(row for graph in self.graphs for row in graph.native))

    @property
    def rejected(self) -> tuple[Rejection, ...]:
        """Every add that was looked at and left alone, of the graphs that differ."""
        seen: dict[tuple[str, str, Reason], Rejection] = {}
        for graph in self.graphs:
            for entry in graph.rejected:
                seen.setdefault((entry.add, entry.location, entry.reason), entry)
        return tuple(seen.values())

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where the stream is averaged and expanded again (`on_graph_break="collapse"`): reason and line, once."""
        return tuple(dict.fromkeys(reason for graph in self.graphs for reason in graph.cuts))

    @property
    def parameters_added(self) -> int:
        """Number of mHC parameters, in elements."""
        n = self.config.n_streams
        manifold = MANIFOLDS[self.config.manifold]
        rows = manifold.rows(n)
        count = sum(rows * n * site.width + rows + manifold.scales for site in self.sites)
        if self.config.readout == "learned":
            count += sum(n * n * chain.sites[-1].width + n + 1 for chain in self.chains)
        return count

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return {
            "model": self.model,
            "config": self.config.to_dict(),
            "parameters_before": self.parameters_before,
            "parameters_added": self.parameters_added,
            "chains": [asdict(chain) for chain in self.chains],
            "native": [asdict(row) for row in self.native],
            "rejected": [_rejection_dict(entry) for entry in self.rejected],
            "prediction": self.prediction.to_dict() if self.prediction is not None else None,
            "pipeline": self.pipeline.to_dict() if self.pipeline is not None else None,
            "graphs": [
                {
                    "function": graph.function,
                    "nodes": graph.nodes,
                    "sites": sum(len(chain.sites) for chain in graph.chains),
                    "break_reason": graph.break_reason,
                    "fusion": _fusion_dict(graph.fusion),
                    "cuts": list(graph.cuts),
                }
                for graph in self.graphs
            ],
        }

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one self-contained HTML page and return its path."""
        import jinja2

        loader = jinja2.PackageLoader("mhc_compile", "templates")
        environment = jinja2.Environment(loader=loader, autoescape=True)
        page = environment.get_template("report.html").render(
            report=self,
            folded=folded,
            rejected=rejected_by_reason(self.rejected),
            manifold=MANIFOLDS[self.config.manifold],
        )
        target = Path(path)
        target.write_text(page, encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def __str__(self) -> str:
        """Return the report as tables that a person can read."""
        from rich.console import Console
        from rich.table import Table

        buffer = io.StringIO()
        console = Console(file=buffer, width=118, color_system=None, highlight=False, emoji=False, markup=False)
        console.print(self._summary())
        for number, chain in enumerate(self.chains, 1):
            table = Table(
                title=f"chain {number}: {_counted(len(chain.sites), 'site')}, from {chain.head}",
                title_justify="left",
            )
            for column in ("site", "norm", "stream", "source"):
                table.add_column(column, overflow="fold")
            rows = folded(chain.sites)
            for row in rows[:_MOST_ROWS]:
                shape = "x".join(str(size) for size in row.site.shape)
                table.add_row(row.name, row.site.norm, f"{shape} {row.site.dtype}", row.site.location)
            if len(rows) > _MOST_ROWS:
                table.add_row(f"… and {len(rows) - _MOST_ROWS} more", "", "", "")
            console.print(table)
        if self.native:
            console.print(self._native_table())
        if self.rejected:
            table = Table(title="adds left as they are", title_justify="left")
            for column in ("count", "why", "source"):
                table.add_column(column, overflow="fold")
            for reason, entries in rejected_by_reason(self.rejected):
                for location, count in entries:
                    table.add_row(str(count), reason, location)
            console.print(table)
        if self.prediction is not None:
            console.print(str(self.prediction))
        if self.pipeline is not None:
            console.print(str(self.pipeline))
        return buffer.getvalue().rstrip()

    def _native_table(self) -> Table:
        from rich.table import Table

        table = Table(title="streams that the model carries itself, run by the operators", title_justify="left")
        for column in ("site", "what it computes", "n x C", "source"):
            table.add_column(column, overflow="fold")
        for row in self.native[:_MOST_ROWS]:
            size = f"{row.n_streams}x{row.width}" if row.n_streams else ""
            table.add_row(row.name, row.mathematics, size, row.location)
        if len(self.native) > _MOST_ROWS:
            table.add_row(f"… and {len(self.native) - _MOST_ROWS} more", "", "", "")
        return table

    def _summary(self) -> str:
        options = self.config
        share = f" ({self.parameters_added / self.parameters_before:.2%})" if self.parameters_before else ""
        lines = [
            f"{self.model}: {_counted(len(self.sites), 'site')} in {_counted(len(self.chains), 'chain')}, "
            f"{options.n_streams} streams on the manifold {options.manifold!r}, init={options.init!r}",
            f"parameters: {self.parameters_before:,} + {self.parameters_added:,}{share}",
        ]
        if self.native:
            count = sum(row.kind in ("site", "call") for row in self.native)
            lines.append(
                f"streams of the model's own: {_counted(count, 'site')}, proved in float64, no parameters added"
            )
        for fusion in dict.fromkeys(graph.fusion for graph in self.graphs if graph.fusion is not None):
            lines.append(f"fusion: {fusion}")
        broken = [graph for graph in self.graphs if graph.break_reason]
        for graph in broken:
            lines.append(f"graph break in {graph.function}: {graph.break_reason}")
        lines += [
            f"the stream is cut, averaged and expanded again, which is another model than the uncut one: {reason}"
            for reason in self.cuts
        ]
        return "\n".join(lines)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _rejection_dict(entry: Rejection) -> dict[str, Any]:
    return {**asdict(entry), "reason": entry.reason.value}


def _fusion_dict(fusion: FusionChoice | None) -> dict[str, str] | None:
    return None if fusion is None else {**asdict(fusion), "reason": fusion.reason.value}


def new_report(root: nn.Module, config: MHCConfig) -> Report:
    """Return an empty report on a model."""
    from ..attachment.site_parameters import SiteParameters

    ours = {id(p) for module in root.modules() if isinstance(module, SiteParameters) for p in module.parameters()}
    before = sum(p.numel() for p in root.parameters() if id(p) not in ours)
    return Report(model=type(root).__name__, config=config, parameters_before=before)


def keep_report(root: nn.Module, report: Report) -> None:
    """Make a report the one that `report(model)` shows."""
    MEMORY.reports[root] = report


def add_to_report(root: nn.Module, config: MHCConfig, graph: GraphReport) -> Report:
    """Add a compiled graph to the model's report, beginning a new one where the options have changed."""
    report = MEMORY.reports.get(root)
    if report is None or report.config != config:
        report = new_report(root, config)
        MEMORY.reports[root] = report
    report.graphs.append(graph)
    return report


def graph_report(
    function: str,
    nodes: int,
    plan: Plan,
    break_reason: str | None,
    fusion: FusionChoice | None = None,
    native: tuple[NativeRow, ...] = (),
) -> GraphReport:
    """Describe one graph."""
    return GraphReport(
        function=function,
        nodes=nodes,
        chains=tuple(chain.chain for chain in plan.chains),
        rejected=plan.rejections,
        break_reason=break_reason,
        fusion=fusion,
        cuts=plan.cuts,
        native=native,
    )


def report_of(root: nn.Module) -> Report | None:
    """Return the report on a model; that of a module inside it, if Dynamo compiled only that."""
    if root in MEMORY.reports:
        return MEMORY.reports[root]
    return next((MEMORY.reports[module] for module in root.modules() if module in MEMORY.reports), None)


def forget_report(root: nn.Module) -> None:
    """Forget what was reported on a model."""
    for module in root.modules():
        MEMORY.reports.pop(module, None)
