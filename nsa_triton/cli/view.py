"""How the command line prints: tables that fit a terminal, progress on long work, JSON for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PIPE_WIDTH = 160  # where the output is no terminal, long cells need not be cut


def console() -> Console:
    """Standard output. rich leaves colours out for NO_COLOR and where the output is no terminal."""
    on_terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if on_terminal else PIPE_WIDTH, highlight=False)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


class Steps:
    """Long work, one step after the other: a bar on a terminal, one plain line per step elsewhere."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self._task = progress.add_task("", total=total) if progress else None

    def next(self, what: str) -> None:
        """Say that `what` begins."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=what)
        elif self._progress is None:
            print(f"[{self._done + 1}/{self._total}] {what}", file=sys.stderr, flush=True)

    def done(self) -> None:
        self._done += 1
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """Progress goes to standard error, so that standard output stays clean."""
    if not sys.stderr.isatty():
        yield Steps(None, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield Steps(progress, total)


def seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.0f} µs"
    return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
