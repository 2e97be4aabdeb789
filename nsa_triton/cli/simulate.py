"""Run every op in the simulator of an Ascend chip: right numbers, estimated times, races. No NPU is needed.

What runs is the final on-chip program of each kernel, as the real Ascend compiler makes it, instruction by instruction.
Numbers are judged like those of `nsa-triton check`. Times are estimates of a model of the chip, never measurements.
Exits with 1 if a number is wrong or a fault was found.

Columns: ir, the version of ascendnpu-ir; busiest, the pipe (or HBM, L2) that is busy for the largest share of the time,
as a mean over the cores that ran; roof, the least time that the bytes and products allow, as a share of the estimated
one; HBM MB, bytes read from and written to it; faults, with --check-races.
"""

from __future__ import annotations

import argparse
import linecache
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import nsa_triton
from nsa_triton.ascend.chips import CHIPS, chip
from nsa_triton.ascend.lower import ARCH
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.costs import parameters
from nsa_triton.ascend.simulator.faults import Fault, SimulationError
from nsa_triton.ascend.simulator.report import LaunchReport, total_us
from nsa_triton.ascend.simulator.trace import matplotlib_figure, plot_timeline, write_trace
from nsa_triton.ascend.toolchain import Compiler, compiler, front_end_problem, require
from nsa_triton.cli.judging import SHORT, dtype_name, judged
from nsa_triton.cli.view import console, print_json, steps
from nsa_triton.errors import ArgumentValueError, CompileError
from nsa_triton.ops._common.accuracy import Accuracy
from nsa_triton.ops._common.cases import CheckCase
from nsa_triton.ops.catalog import families
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from nsa_triton.runtime.simulation import simulating

EXAMPLE = "nsa-triton simulate compress_attention_infer --case B=2 --check-races --plot timeline.png"
SOURCES = Path(nsa_triton.__file__).parent / "ops"
WORTH_NAMING = 0.005  # of the time: pipes that are busy for less are left out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help="op families or functions (default: all)")
    parser.add_argument("--chip", default=ARCH, help=f"one of {', '.join(CHIPS)} (default: {ARCH})")
    parser.add_argument("--compiler", action="append", help="ascendnpu-ir version, may be repeated (default: newest)")
    parser.add_argument("--case", metavar="TEXT", default="", help="only cases whose shape contains TEXT")
    parser.add_argument("--check-races", action="store_true", help="find races, undefined values and misused flags")
    parser.add_argument("--full", action="store_true", help="time all rounds of long loops (default: samples of them)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="write a trace for ui.perfetto.dev (JSON)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw when each pipe was busy (PNG)")


@dataclass(frozen=True)
class Simulated:
    """One case with one compiler. `stopped` says why there are no numbers."""

    op: str
    dtype: str
    shape: str
    compiler: str
    launches: tuple[tuple[LaunchReport, Counter[Fault]], ...]
    numbers: dict[str, Accuracy]
    stopped: str

    @property
    def name(self) -> str:
        return f"{self.op} {SHORT[self.dtype]} {self.shape}"

    @property
    def verdict(self) -> str:
        if self.stopped:
            return "STOPPED"
        return "ok" if all(accuracy.ok for accuracy in self.numbers.values()) else "WRONG"

    @property
    def faults(self) -> Iterator[tuple[Fault, int, str]]:
        """Each with its count and the kernel."""
        for report, faults in self.launches:
            for fault, count in faults.items():
                yield fault, count, report.kernel

    def to_json(self) -> dict[str, Any]:
        reports = [report for report, _ in self.launches]
        launches = [{**report.to_json(), "faults": _faults_json(faults)} for report, faults in self.launches]
        outputs = [{"output": name, **asdict(one), "ok": one.ok} for name, one in self.numbers.items()]
        return {
            "op": self.op, "dtype": self.dtype, "shape": self.shape, "compiler": self.compiler,
            "verdict": self.verdict, "stopped": self.stopped, "us": total_us(reports), "outputs": outputs,
            "launches": launches,
        }  # fmt: skip


def _faults_json(faults: Counter[Fault]) -> list[dict[str, Any]]:
    return [{**asdict(fault), "count": count} for fault, count in faults.items()]


def run(options: argparse.Namespace) -> int:
    plan = _plan(options)
    _require_files(options)
    done: list[Simulated] = []
    try:
        with steps(len(plan)) as progress:
            for case, version in plan:
                progress.next(f"{case.op} {dtype_name(case.dtype)} {case.shape}, ascendnpu-ir {version.version}")
                done.append(_simulated(case, version, options))
                progress.done()
    finally:  # after Ctrl-C too: what was found so far is not lost
        _tell(done, options)
    return 1 if any(one.verdict != "ok" or any(one.faults) for one in done) else 0


def _plan(options: argparse.Namespace) -> list[tuple[CheckCase, Compiler]]:
    chip(options.chip)  # a bad name is the user's mistake: say so before any work
    cases = [case for family in families(options.op) for case in family.check_cases(torch.device("cpu"))]
    chosen = [case for case in cases if options.case in case.shape]
    if not chosen:
        shapes = "".join(f"\n    {case.op}: {case.shape}" for case in cases)
        raise ArgumentValueError("--case", "a part of one of these shapes", f"{options.case!r}{shapes}")
    require(front_end_problem())
    versions = [compiler(version) for version in options.compiler or [None]]
    return [(case, version) for case in chosen for version in versions]


def _require_files(options: argparse.Namespace) -> None:
    """Whether the wanted files can be written is known before minutes of work, not after."""
    if options.plot is not None:
        matplotlib_figure()
        if options.plot.suffix.lower() != ".png":
            raise ArgumentValueError("--plot", "a file that ends in .png", str(options.plot))
    for argument, path in (("--trace", options.trace), ("--plot", options.plot)):
        if path is not None:
            _require_writable(argument, path)


def _require_writable(argument: str, path: Path) -> None:
    existed = path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        hint = "" if path.parent.is_dir() else f"Create its folder: mkdir -p {path.parent}"
        raise ArgumentValueError(argument, "a file that can be written", f"{path}: {error.strerror}", hint) from error
    if not existed:
        path.unlink()


class _Simulation(SimulatorExecutor):
    """Times each launch, then computes it. So what a launch reads to find its way was computed by those before it, and
    what it writes in place is not there yet when it is timed."""

    def __init__(self, version: Compiler, options: argparse.Namespace) -> None:
        keeps_events = options.trace is not None or options.plot is not None
        super().__init__(options.chip, version, sampled=not options.full, keeps_events=keeps_events)
        self.checks = options.check_races
        self.faults: list[Counter[Fault]] = []  # of each launch

    def launch(self, *launch: Any, **named: Any) -> None:
        self.times, self.checker = True, None
        super().launch(*launch, **named)
        checker = Checker()
        self.faults.append(checker.faults)
        self.times, self.checker = False, checker if self.checks else None
        super().launch(*launch, **named)


def _simulated(case: CheckCase, version: Compiler, options: argparse.Namespace) -> Simulated:
    """A program that stops, or that the compiler refuses, does not hide what is known of the others."""
    numbers, stopped = {}, ""
    simulation = _Simulation(version, options)
    try:
        with simulating(simulation):
            outputs = case.run()
        numbers = dict(judged(case, outputs))
    except (SimulationError, CompileError) as error:
        stopped = str(error)
    launches = tuple(zip(simulation.reports, simulation.faults, strict=True))
    return Simulated(case.op, dtype_name(case.dtype), case.shape, version.version, launches, numbers, stopped)


# ---- what is told ----


def _tell(done: Sequence[Simulated], options: argparse.Namespace) -> None:
    """Files first: whoever reads the output may stop reading."""
    reports = [report for one in done for report, _ in one.launches]
    for path, write in ((options.trace, write_trace), (options.plot, plot_timeline)):
        if path is not None and reports:
            write(reports, path)
            print(f"wrote {path}", file=sys.stderr)
    if options.json:
        print_json(_json(done, options))
    elif done:
        console().print(_view(done, options))


def _json(done: Sequence[Simulated], options: argparse.Namespace) -> dict[str, Any]:
    return {
        "simulated": True, "model": parameters()["version"], "chip": options.chip, "sampled": not options.full,
        "checks_races": options.check_races, "cases": [one.to_json() for one in done],
    }  # fmt: skip


def _view(done: Sequence[Simulated], options: argparse.Namespace) -> Group:
    title = f"simulated, model version {parameters()['version']}, {options.chip}: no NPU was involved\n"
    parts = [Text(title, style="bold"), *_tables(done, options), *_problems(done)]
    launched = [report for one in done for report, _ in one.launches]
    if launched:
        parts.append(_slowest(max(launched, key=lambda report: report.us)))
    return Group(*parts, _summary(done, options))


def _tables(done: Sequence[Simulated], options: argparse.Namespace) -> Iterator[RenderableType]:
    """One row per launch, below the name of its case."""
    width = max((len(report.kernel) for one in done for report, _ in one.launches), default=0)
    header = _table(width, options.check_races)
    header.show_header = True
    yield header
    for name, group in groupby(done, key=lambda one: one.name):
        table = _table(width, options.check_races)
        for one in group:
            _add_rows(table, one, options.check_races)
        yield Text(name, style="cyan")
        yield table


def _table(kernel_width: int, checks: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=False)
    table.add_column("  ir", min_width=7, no_wrap=True)
    table.add_column("kernel", min_width=kernel_width, no_wrap=True)
    table.add_column("µs", min_width=7, justify="right", no_wrap=True)
    table.add_column("busiest", min_width=13, justify="right", no_wrap=True)
    for heading in ("roof", "HBM MB", *(["faults"] if checks else [])):
        table.add_column(heading, min_width=6, justify="right", no_wrap=True)
    table.add_column("numbers", min_width=7, no_wrap=True)
    return table


def _add_rows(table: Table, one: Simulated, checks: bool) -> None:
    """The verdict is that of the whole case: it stands beside its last launch."""
    rows = [_cells(report, faults, checks) for report, faults in one.launches] or [["-"] * (len(table.columns) - 2)]
    for i, cells in enumerate(rows):
        table.add_row(f"  {one.compiler}" if i == 0 else "", *cells, _verdict(one) if i == len(rows) - 1 else "")


def _cells(report: LaunchReport, faults: Counter[Fault], checks: bool) -> list[str | Text]:
    figures = (f"{report.us:.1f}", _busiest(report), f"{report.roofline:.0%}", f"{_hbm_bytes(report) / 1e6:.2f}")
    found = [Text(str(len(faults)), style="red" if faults else "")] if checks else []
    return [report.kernel, *figures, *found]


def _busiest(report: LaunchReport) -> str:
    return f"{report.critical} {({**report.busy, **report.shared})[report.critical]:>4.0%}"


def _hbm_bytes(report: LaunchReport) -> int:
    return sum(count for name, count in report.bytes.items() if name.startswith("HBM"))


def _verdict(one: Simulated) -> Text:
    return Text(one.verdict, style="green" if one.verdict == "ok" else "bold red")


def _problems(done: Sequence[Simulated]) -> Iterator[Text]:
    """Why cases stopped, and one line per distinct fault."""
    yield Text()
    for one in done:
        if one.stopped:
            yield Text(f"{one.name}, ascendnpu-ir {one.compiler} stopped: {one.stopped}", style="red")
    for fault, places in _distinct(done).items():
        where = ", ".join(f"{count} in {place}" for place, count in places.items())
        yield Text.assemble((str(fault), "red"), f": {where}")


def _distinct(done: Iterable[Simulated]) -> dict[Fault, Counter[str]]:
    """How often each fault was found, by kernel and compiler."""
    found: dict[Fault, Counter[str]] = {}
    for one in done:
        for fault, count, kernel in one.faults:
            found.setdefault(fault, Counter())[f"{kernel} by {one.compiler}"] += count
    return found


def _slowest(report: LaunchReport) -> Group:
    """How busy its pipes are, and what its lines cost."""
    title = f"slowest: {report.kernel} by {report.compiler}, {report.us:.1f} µs, {report.blocks} blocks"
    busy = sorted({**report.busy, **report.shared}.items(), key=lambda item: -item[1])
    pipes = ", ".join(f"{pipe} {share:.0%}" for pipe, share in busy if share >= WORTH_NAMING)
    lines = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    lines.add_column("cost", min_width=5, justify="right", no_wrap=True)
    lines.add_column("line", min_width=max(map(len, report.lines), default=0), no_wrap=True)
    lines.add_column("", no_wrap=True, style="dim")
    for place, share in report.lines.items():
        lines.add_row(f"{share:.1%}", place, Text(_code(place)))
    return Group(Text(title, style="bold"), Text(f"busy: {pipes}"), lines, Text())


def _code(place: str) -> str:
    """The line of code at `compress/kernels.py:70`; nothing for kernels from elsewhere."""
    file, _, line = place.rpartition(":")
    return linecache.getline(str(SOURCES / file), int(line)).strip() if line.isdigit() else ""


def _summary(done: Sequence[Simulated], options: argparse.Namespace) -> str:
    bad, faults = sum(one.verdict != "ok" for one in done), len(_distinct(done))
    if bad or faults:
        return f"[red]{bad} of {len(done)} runs are wrong or stopped; {faults} different faults[/]"
    return f"[green]{len(done)} runs: all numbers are right{', no faults' if options.check_races else ''}[/]"
