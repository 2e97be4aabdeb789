"""Run every op on this machine against its float64 reference: errors and times. The main job.

Each op runs its Triton kernels on the chosen target (on `cpu`: what the Ascend compiler's front end makes of them,
as native code) and passes if its error is no larger than that of eager PyTorch in the same dtype.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from nsa_triton.cli.judging import SHORT, dtype_name, judged
from nsa_triton.cli.view import console, print_json, seconds, steps
from nsa_triton.errors import ToolchainError
from nsa_triton.ops._common.cases import CheckCase
from nsa_triton.ops.catalog import families
from nsa_triton.runtime.target import present_targets, target_of

EXAMPLE = "nsa-triton check compress --target cpu"
WARM_CALLS = 5
ROOMY = 100  # columns; a narrower terminal shows the RMS error only


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help="op families or functions (default: all)")
    parser.add_argument("--target", choices=("auto", "cpu", "cuda", "npu"), default="auto", help="default: the fastest")


@dataclass(frozen=True)
class Row:
    op: str
    output: str
    shape: str
    dtype: str
    max_error: float
    rms_error: float
    limit: float
    ok: bool
    first_call_s: float
    warm_call_s: float


def run(options: argparse.Namespace) -> int:
    device = _device(options.target)
    cases = [case for family in families(options.op) for case in family.check_cases(device)]
    rows: list[Row] = []
    with steps(len(cases)) as progress:
        for case in cases:
            progress.next(f"{case.op} {dtype_name(case.dtype)} {case.shape}")
            rows += _judged(case, device)
            progress.done()
    failed = sum(not row.ok for row in rows)
    target = target_of(device)
    if options.json:
        print_json({"target": asdict(target), "torch": torch.__version__, "rows": [asdict(row) for row in rows]})
    else:
        _print(rows, f"target {target.name}, {target.units}")
        verdict = f"[red]{failed} of {len(rows)} outputs are wrong[/]" if failed else "[green]all outputs are right[/]"
        console().print(verdict)
    return 1 if failed else 0


def _device(wanted: str) -> torch.device:
    present = present_targets()
    kind = present[0] if wanted == "auto" else wanted
    if kind not in present:
        raise ToolchainError(f"target {kind} is not present on this machine; present: {', '.join(present)}")
    return torch.device(kind)


def _judged(case: CheckCase, device: torch.device) -> list[Row]:
    outputs, first = _timed(case.run, device)
    warm = statistics.median(_timed(case.run, device)[1] for _ in range(WARM_CALLS))
    return [
        Row(case.op, name, case.shape, dtype_name(case.dtype), **asdict(accuracy), ok=accuracy.ok, first_call_s=first,
            warm_call_s=warm)
        for name, accuracy in judged(case, outputs)
    ]  # fmt: skip


def _timed(
    call: Callable[[], tuple[torch.Tensor, ...]], device: torch.device
) -> tuple[tuple[torch.Tensor, ...], float]:
    began = time.perf_counter()
    outputs = call()
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return outputs, time.perf_counter() - began


def _print(rows: list[Row], title: str) -> None:
    wide = console().width >= ROOMY
    table = Table(
        title=title, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    table.add_column("op")
    table.add_column("shape")
    table.add_column("dtype", no_wrap=True)
    for heading in (*(["max error"] if wide else []), "RMS error", "allowed", "first call", "warm", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        errors = (*([row.max_error] if wide else []), row.rms_error, row.limit)
        verdict = "[green]ok[/]" if row.ok else "[red]WRONG[/]"
        times = (seconds(row.first_call_s), seconds(row.warm_call_s))
        name = row.op if row.output == "output" else f"{row.op} {row.output}"
        table.add_row(name, row.shape, SHORT[row.dtype], *(f"{error:.1e}" for error in errors), *times, verdict)
    console().print(table)
