"""Search tiles and launch options for a chip, and write the winners into autotune_configs.

Candidates that arithmetic or the real Ascend compiler refuses are dropped; the others are ranked, by the device's timer
on a chip of this machine, in the simulator on an Ascend chip that is not here. The winner must pass the check cases of
its op and beat the default. Everything is kept in a journal at once: the same command goes on where it was.

With --dry-run nothing is searched: how many candidates there are, how many arithmetic leaves, and about how long it
takes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from nsa_triton.ascend.chips import CHIPS, UB_LIMIT
from nsa_triton.ascend.lower import ARCH
from nsa_triton.ascend.toolchain import front_end_problem, require
from nsa_triton.cli.view import console, print_json
from nsa_triton.errors import ArgumentValueError
from nsa_triton.runtime.configs import config_root
from nsa_triton.runtime.target import present_targets
from nsa_triton.tuning.merge import require_mergeable
from nsa_triton.tuning.plans import Estimate, Request, estimate, sweeps
from nsa_triton.tuning.result import Result
from nsa_triton.tuning.search import Search
from nsa_triton.tuning.sweep import Candidate, Sweep, Verdict
from nsa_triton.tuning.timing import place_named, present_chips
from nsa_triton.tuning.tune import Interrupted, Output, tune
from nsa_triton.tuning.workers import checked
from nsa_triton.workloads import SHAPES, shape_named

EXAMPLE = "nsa-triton tune compress --chip Ascend910B2 --tokens 8192 --budget 30"
TOKENS = 8192
SHOWN = 3  # runners-up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("op", nargs="+", help="op families or functions")
    add("--chip", action="append", help="a chip of this machine, cpu, or an Ascend chip; may be repeated")
    add("--compiler", action="append", help="ascendnpu-ir version, may be repeated (default: newest)")
    add("--shape", action="append", help=f"may be repeated; of {', '.join(SHAPES)} (default: paper)")
    add("--tokens", action="append", type=int, help=f"length of a sequence, may be repeated (default: {TOKENS})")
    add("--kernel", action="append", default=[], help="only this kernel; may be repeated")
    add("--budget", type=float, metavar="MINUTES", help="stop after so long, and keep the best until then")
    add("--until-settled", action="store_true", help="stop once all that lies next to the best has been tried")
    add("--dry-run", action="store_true", help="only count candidates, and say how long they take")
    add("--workers", metavar="N", help="candidates at a time, or ray (default: one per core)")
    add("--output", type=Path, metavar="DIR", help="folder of configs (default: the one that is used)")
    add("--ub-limit", type=int, default=UB_LIMIT, help="percent of the unified buffer (default: %(default)s)")
    add("--fresh", action="store_true", help="forget what the journal knows")
    add("--force", action="store_true", help="let simulated entries take the place of measured ones")


def run(options: argparse.Namespace) -> int:
    checked(options.workers)
    request = _request(options)
    request.chosen_families()  # a bad name is the user's mistake: say so before any work
    if any(place_named(chip, version).simulated for chip, version in request.chips):
        require(front_end_problem())
    wanted = sweeps(request)
    if options.dry_run:
        return _tell_estimates([_estimated(sweep) for sweep in wanted], options)
    output = Output(options.output or config_root(), options.force)
    for chip, family in dict.fromkeys((sweep.chip, sweep.family) for sweep in wanted):
        require_mergeable(output.folder, chip, family)
    with _told() as told:
        try:
            results = tune(
                wanted, output, told, workers=options.workers, minutes=options.budget, settled=options.until_settled,
                fresh=options.fresh,
            )  # fmt: skip
            stopped = False
        except Interrupted as interrupt:
            results, stopped = interrupt.results, True
    _tell(results, options)
    if stopped:
        print("nsa-triton tune: stopped; the same command goes on", file=sys.stderr)
        return 130
    return 1 if any(result.problem or result.best is None for result in results) else 0


def _request(options: argparse.Namespace) -> Request:
    names = options.chip or [_default_chip()]
    for argument, value in (("--budget", options.budget), ("--tokens", min(options.tokens or [1]))):
        if value is not None and value <= 0:
            raise ArgumentValueError(argument, "more than 0", value)
    if not UB_LIMIT <= options.ub_limit <= 100:
        raise ArgumentValueError("--ub-limit", f"an integer from {UB_LIMIT} to 100", options.ub_limit)
    shapes = [shape_named(name) for name in options.shape or ["paper"]]
    chips: list[tuple[str, str | None]] = []
    for name in names:
        place_named(name, None)
        versions = options.compiler or [None] if name in CHIPS and name not in present_chips() else [None]
        chips += [(name, version) for version in versions]
    return Request(options.op, chips, shapes, options.tokens or [TOKENS], options.kernel, options.ub_limit)


def _default_chip() -> str:
    """An accelerator of this machine, else an Ascend chip in the simulator."""
    present = present_targets()
    return next(iter(present_chips())) if present[0] != "cpu" else ARCH


# ---- while it runs ----


class _Told:
    """A bar on a terminal, a line per candidate elsewhere; both with the best so far and the time that is left."""

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._began, self._known = time.monotonic(), 0

    def begin(self, sweep: Sweep, search: Search, known: int) -> None:
        self._began, self._known = time.monotonic(), known
        print(f"{sweep}: {search.total} candidates" + (f", {known} known" if known else ""), file=sys.stderr)
        if self._bar is not None:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(_best(search), total=search.total, completed=known)

    def heard(self, search: Search, candidate: Candidate, verdict: Verdict) -> None:
        done = len(search.verdicts)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=_best(search), completed=done)
            return
        each = (time.monotonic() - self._began) / max(1, done - self._known)
        found = f"{verdict.us:.1f} µs" if verdict.us is not None else f"{verdict.verdict}: {verdict.why[:60]}"
        left = f"{_duration(each * (search.total - done))} left"
        print(f"[{done}/{search.total}] {candidate}: {found}; {_best(search)}; {left}", file=sys.stderr, flush=True)


def _best(search: Search) -> str:
    default = search.us(search.default)
    if search.best is None:
        return "none works yet"
    return f"best {search.us(search.best):.1f} µs" + (f", default {default:.1f}" if default is not None else "")


@contextmanager
def _told() -> Iterator[_Told]:
    if not sys.stderr.isatty():
        yield _Told(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Told(bar)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# ---- at the end ----


def _tell(results: Sequence[Result], options: argparse.Namespace) -> None:
    if options.json:
        print_json([result.to_json() for result in results])
        return
    table = _table("op", "kernel", "shape", "chip", ("default µs", "best µs", "ratio"), "tiles", "runners-up")
    for result in results:
        table.add_row(*_row(result))
    console().print(table)
    for result in results:
        for candidate, said in result.refused.items():
            console().print(f"[red]{result.sweep}: {candidate} is not kept: {said}[/]", soft_wrap=True)
        if result.problem:
            console().print(f"[red]{result.problem}[/]", soft_wrap=True)
    for file in dict.fromkeys(result.file for result in results if result.file):
        console().print(f"written: {file}", soft_wrap=True)


def _row(result: Result) -> list[str]:
    sweep = result.sweep
    chip = sweep.chip + (f" {sweep.compiler}" if sweep.compiler else "")
    nothing = "none works" if result.tried else "no time"
    stays = "the default's, all around them was tried" if result.settled else "the default's"
    tiles = nothing if result.best is None else stays if not result.wins else str(result.best)
    others = ", ".join(f"{one} ({us:.1f})" for one, us in result.runners_up[:SHOWN])
    left = f" ({result.left} not tried)" if result.left else ""
    ratio = f"{result.ratio:.2f}" if result.ratio else ""
    shape = f"{sweep.shape.name} {sweep.tokens}"
    return [
        sweep.op.removeprefix("nsa_"), sweep.kernel, shape, chip, _us(result.default_us), _us(result.us), ratio,
        tiles + left, others,
    ]  # fmt: skip


def _us(us: float | None) -> str:
    return "" if us is None else f"{us:.1f}"


def _estimated(sweep: Sweep) -> Estimate:
    print(f"{sweep}: counting, and trying the default", file=sys.stderr)
    return estimate(sweep)


def _tell_estimates(estimates: Sequence[Estimate], options: argparse.Namespace) -> int:
    if options.json:
        print_json([{**asdict(one), "seconds": one.seconds} for one in estimates])
        return 0
    columns = ("candidates", "left", "with options", "known", "each", "at most")
    table = _table("op", "kernel", "shape", "chip", columns)
    for one in estimates:
        sweep = one.sweep
        numbers = (str(n) for n in (one.candidates, one.left, one.options, one.known))
        chip = sweep.chip + (f" {sweep.compiler}" if sweep.compiler else "")
        shape = f"{sweep.shape.name} {sweep.tokens}"
        times = (_duration(one.seconds_each), _duration(one.seconds))
        table.add_row(sweep.op.removeprefix("nsa_"), sweep.kernel, shape, chip, *numbers, *times)
    console().print(table)
    total = _duration(sum(one.seconds for one in estimates))
    console().print(f"at most {total} with one worker; --budget ends it sooner")
    return 0


def _table(*columns: Any) -> Table:
    """Columns of text, and tuples of columns of numbers."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        for name in (column,) if isinstance(column, str) else column:
            table.add_column(name, justify="left" if isinstance(column, str) else "right", overflow="fold")
    return table
