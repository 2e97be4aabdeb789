"""Compile reports on a terminal: one line each, and below them what is wrong."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nsa_triton.ascend.report import CompileReport


def report_view(reports: Sequence[CompileReport]) -> Group:
    """The table of all reports, and below it the problems of those that have any."""
    return Group(report_table(reports), report_problems(reports))


def report_table(reports: Sequence[CompileReport]) -> Table:
    """One line per report, made for 100 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("kernel", ratio=1, overflow="fold")
    table.add_column("chip", no_wrap=True)
    table.add_column("ir", no_wrap=True)
    table.add_column("ok", no_wrap=True)
    for name in ("UB%", "L1%", "L0C%", "ws KB", "vec", "cube", "dma", "sync", "2buf", "scal", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for report in reports:
        table.add_row(*_cells(report))
    return table


def report_problems(reports: Sequence[CompileReport]) -> Group:
    """The problems of every report that has any, under its label."""
    parts: list[RenderableType] = []
    for report in reports:
        problems = Table.grid(padding=(0, 1))
        for problem in report.problems():
            problems.add_row("  -", Text(problem))
        if problems.row_count:
            title = f"\n{report.label} for {report.chip}, ascendnpu-ir {report.compiler}"
            parts += [Text(title, style="bold"), problems]
    return Group(*parts)


def _cells(report: CompileReport) -> list[Text]:
    return [
        Text(report.label),
        Text(report.chip.removeprefix("Ascend")),
        Text(report.compiler),
        _verdict(report),
        *(_figures(report) if report.fits else [Text("-", style="dim")] * 10),
        Text(f"{report.seconds:.1f}"),
    ]


def _verdict(report: CompileReport) -> Text:
    if not report.ok:
        return Text("NO", style="bold red")
    return Text("bad", style="yellow") if report.problems() else Text("yes", style="green")


def _figures(report: CompileReport) -> list[Text]:
    fallbacks = len(report.scalar_fallbacks())
    buffers = Text("lost", style="yellow") if report.double_buffer_dropped else Text(str(report.double_buffers))
    return [
        Text(f"{report.ub_percent:.0f}", style="yellow" if report.fills_ub else ""),
        Text(f"{report.percent('L1'):.0f}"),
        Text(f"{report.percent('L0C'):.0f}"),
        Text(f"{report.workspace / 1024:.0f}"),
        *(Text(str(report.total(kind))) for kind in ("vector", "cube", "dma", "sync")),
        buffers,
        Text(str(fallbacks), style="yellow" if fallbacks else ""),
    ]
