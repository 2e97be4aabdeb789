"""Time every op against its reference, dense attention and CANN's closed operators, side by side.

Each op is held against float64 first; what is wrong is not timed. Providers take turns, round by round, on several sets
of inputs: once with cold caches, once with warm ones. Rows are written as they come, one file per target under
--output; after an interruption, --resume goes on. Exits with 1 if a provider is wrong or fails.

Providers: ours; reference, plain PyTorch; sdpa, dense causal attention, which sparse attention replaces; torch_npu,
where it is installed; roofline, the least time that bytes and products allow, where the device's rates are known;
simulated, an estimate for an Ascend chip that is not here, kept apart from what is measured.

Columns: cold, warm, p20–p80, medians and percentiles of the rounds; × reference, how many times as fast as the
reference, cold. Live blocks are those that a token attends to on average.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import nsa_triton
from nsa_triton.ascend.chips import CHIPS, chip
from nsa_triton.cli.view import console, print_json, seconds, steps
from nsa_triton.errors import ArgumentValueError, ToolchainError
from nsa_triton.runtime.target import present_targets
from nsa_triton.workloads import SHAPES

EXAMPLE = "nsa-triton bench nsa_select_attention --shape gqa-d128-g4 --lengths 512 1024 --providers ours sdpa"
PACKAGE = Path(nsa_triton.__file__).parent
SECONDS = 6.0  # for each point, beyond the fewest rounds
QUICK_SECONDS, QUICK_ROUNDS = 1.0, 3


def bench_module(name: str) -> ModuleType:
    """A module of the benchmarks: inside the installed package, or beside it in the repository."""
    return importlib.import_module(f"nsa_triton.bench.{name}" if _is_installed() else f"bench.{name}")


def results_folder() -> Path:
    """That of the repository; where the package is installed, a folder of the user's."""
    return Path("nsa-triton-bench") if _is_installed() else PACKAGE.parent / "bench" / "results"


def _is_installed() -> bool:
    return (PACKAGE / "bench").is_dir()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", metavar="OP", help="functions, nsa_compress for example (default: all)")
    parser.add_argument("--shape", nargs="+", default=[], help=f"of models: {', '.join(SHAPES)} (default: paper)")
    parser.add_argument("--lengths", nargs="+", type=int, default=[], metavar="N", help="tokens of each sequence")
    parser.add_argument("--providers", nargs="+", default=[], help="default: all that are here, without simulated")
    parser.add_argument("--indices", nargs="+", default=[], help="distributions of selected blocks (default: scores)")
    parser.add_argument("--quick", action="store_true", help="all ops at one small shape, in under two minutes")
    parser.add_argument("--end-to-end", action="store_true", help="a layer of all ops against a dense one instead")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was interrupted")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--target", choices=("auto", "cpu", "cuda", "npu"), default="auto", help="default: the fastest")
    parser.add_argument("--chip", default="Ascend910B2", help=f"to simulate; one of {', '.join(CHIPS)}")


def run(options: argparse.Namespace) -> int:
    if options.end_to_end:
        return _end_to_end(options)
    cases, bench = bench_module("cases"), bench_module("run")
    chip(options.chip)
    wanted = cases.Wanted(
        options.op, options.shape, options.lengths, options.providers, options.indices, quick=options.quick
    )
    device = _device(options.target)
    points = list(cases.points(wanted, on_cpu=device.type == "cpu"))
    session = bench.Session(device, SECONDS, options.chip)
    if options.quick:
        session = replace(session, seconds=QUICK_SECONDS, fewest_rounds=QUICK_ROUNDS)
    missing = bench.missing_providers(points, session.target)
    bench.require_any(points, missing, asked=options.providers)
    folder, name = options.output or results_folder(), "quick" if options.quick else "bench"
    try:
        with steps(len(points)) as progress:
            rows, files = bench.run(points, session, folder, name, resume=options.resume, progress=progress)
    except KeyboardInterrupt:
        print("rows of the cases that were done are kept; --resume goes on", file=sys.stderr)
        raise
    if options.json:
        print_json([asdict(row) for row in rows])
    else:
        _print(rows, session.machine)
        for provider, why in missing.items():
            console().print(f"without {provider}: {why}")
        for file in files:
            console().print(f"wrote {file}")
    return 1 if any(row.status != "ok" for row in rows) else 0


def _end_to_end(options: argparse.Namespace) -> int:
    """A training step and decoding, NativeSparseAttention against dense attention."""
    for name in ("op", "providers", "indices", "quick", "resume"):
        if given := getattr(options, name):
            hint = "Only --shape, --lengths, --target and --output go with it"
            raise ArgumentValueError(name, "to be left out with --end-to-end", given, hint)
    device, folder = _device(options.target), options.output or results_folder()
    console().print(f"wrote {bench_module('end_to_end').run(device, options.shape, options.lengths, folder)}")
    return 0


def _device(wanted: str) -> torch.device:
    present = present_targets()
    if wanted not in ("auto", *present):
        raise ToolchainError(f"target {wanted} is not present on this machine; present: {', '.join(present)}")
    return torch.device(present[0] if wanted == "auto" else wanted)


def _print(rows: list[Any], machine: dict[str, str]) -> None:
    """A block per case; times of different kinds never stand in one column."""
    title = f"{machine['device']}, torch {machine['torch']}, commit {machine['commit'] or 'unknown'}"
    parts: list[RenderableType] = [Text(title, style="bold"), _table(header=True)]
    for _, same in groupby(rows, key=lambda row: row.case):
        parts += _case(list(same))
    for device in dict.fromkeys(row.device for row in rows if row.provider == "simulated"):
        parts.append(Text(f"{device}: an estimate, never to be read as a measurement"))
    parts += [Text(f"{row.op} {row.provider}: {row.status}", style="red") for row in rows if row.status != "ok"]
    console().print(Group(*parts))


def _table(*, header: bool = False) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=header)
    table.add_column("  provider", min_width=11, no_wrap=True)
    for heading, width in (("cold", 8), ("p20–p80", 17), ("warm", 8), ("p20–p80", 17), ("× reference", 11)):
        table.add_column(heading, min_width=width, justify="right", no_wrap=True)
    for heading in ("simulated", "bound"):
        table.add_column(heading, min_width=9, justify="right", no_wrap=True)
    return table


def _case(rows: list[Any]) -> list[RenderableType]:
    first, table = rows[0], _table()
    reference = next((row.us for row in rows if (row.provider, row.cache) == ("reference", "cold")), None)
    for provider, same in groupby(rows, key=lambda row: row.provider):
        table.add_row(f"  {provider}", *_cells(list(same), reference))
    chosen = f", {first.live_blocks} live blocks ({first.indices})" if first.live_blocks else ""
    sequences = f"{first.batch} × " if first.batch != "1" else ""
    return [Text(f"{first.op} {first.shape}, {sequences}{first.tokens} tokens{chosen}", style="cyan"), table]


def _cells(rows: list[Any], reference: float | None) -> list[str]:
    row = rows[0]
    if row.status != "ok":
        return [f"[red]{row.status.partition(':')[0]}[/]"]
    if not row.cache:
        return ["", "", "", "", "", _us(row.simulated_us), _us(row.bound_us)]
    times = [text for one in rows for text in (_us(one.p50_us), f"{_us(one.p20_us)}–{_us(one.p80_us)}")]
    return [*times, f"{reference / row.us:.2f}" if reference else ""]


def _us(text: str) -> str:
    if not text:
        return ""
    return f"{float(text):.1f} µs" if float(text) < 100 else seconds(float(text) / 1e6)
