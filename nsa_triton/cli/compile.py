"""Compile every kernel for Ascend chips with the real Ascend compiler; no NPU is needed.

Reports what fits, the on-chip memory used, instructions by kind, and everything that speaks against the kernel:
overflow, scalar fallbacks, masks that became unmasked accesses, double buffering dropped, more than 80 % of the unified
buffer. Exits with 1 if there is any such problem. Where CANN's own `hivmc` is on PATH, it goes on to the object file.

Columns: ir, the version of ascendnpu-ir; UB%, L1%, L0C%, the used share of each on-chip memory (L0A and L0B are managed
by the cube's device templates: the module does not show them); ws KB, workspace in global memory per block; vec, cube,
dma, sync, instructions in the program; 2buf, buffers that are doubled so that copies overlap with computing; scal,
scalar fallbacks; s, seconds.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from nsa_triton.ascend.chips import CHIPS, chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ascend.lower import ARCH
from nsa_triton.ascend.report import CompileReport
from nsa_triton.ascend.report_view import report_view
from nsa_triton.ascend.toolchain import compiler, front_end_problem, require
from nsa_triton.cli.view import console, print_json, steps
from nsa_triton.ops.catalog import families
from nsa_triton.runtime.target import ascend_target

EXAMPLE = "nsa-triton compile compress --chip Ascend910B2 --keep modules"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help="op families or functions (default: all)")
    parser.add_argument("--chip", action="append", help=f"may be repeated; one of {', '.join(CHIPS)} (default: {ARCH})")
    parser.add_argument("--compiler", action="append", help="ascendnpu-ir version, may be repeated (default: newest)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep modules and compiler logs in DIR")
    parser.add_argument("--workers", type=int, help="compiles at a time (default: one per core)")


def run(options: argparse.Namespace) -> int:
    jobs = _jobs(options)
    with steps(len(jobs)) as progress:

        def done(report: CompileReport) -> None:
            progress.next(f"{report.kernel} {report.chip} {report.compiler}")
            progress.done()

        reports = compile_many(jobs, options.workers, done, options.keep)
    if options.json:
        print_json([report.to_json() for report in reports])
    else:
        console().print(report_view(reports))
        bad = sum(bool(report.problems()) for report in reports)
        good = f"[green]{len(reports)} compiles: all fit, no problems[/]"
        console().print(f"[red]{bad} of {len(reports)} compiles have problems[/]" if bad else good)
    return 1 if any(report.problems() for report in reports) else 0


def _jobs(options: argparse.Namespace) -> list[Job]:
    """Every kernel of every case, for every chip and compiler; launches that several cases share come once."""
    chips = [chip(name) for name in options.chip or [ARCH]]
    cases = [case for family in families(options.op) for case in family.compile_cases()]
    require(front_end_problem())
    versions = [compiler(version) for version in options.compiler or [None]]
    jobs: dict[tuple[str, str, str, str], Job] = {}
    for one, version in itertools.product(chips, versions):
        target = ascend_target(one, version.version)
        for launch in (launch for case in cases for launch in case.plans(target)):
            spec = launch.specialization()
            job = Job(spec, one.name, version, launch.options, launch.ub_limit)
            jobs.setdefault((spec.key(), one.name, version.version, repr(launch.options)), job)
    return list(jobs.values())
