"""What every kernel costs on a chip, in figures that no machine's noise can change: the guard against regressions.

    python -m bench.baseline            # rewrites bench/results/baseline.json; tests/test_baseline.py compares

For each kernel of each op's compile cases with the default configs: instructions by kind and bytes of on-chip memory,
by the newest Ascend compiler. For each op at one small shape: simulated cycles of its launches. Nothing is measured.
ascendnpu-ir 1.0.0 is left out: how it lays out buffers varies from one build of the same kernel to the next.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ascend.report import CompileReport
from nsa_triton.ascend.toolchain import Compiler, compiler, front_end_problem, require
from nsa_triton.errors import CompileError
from nsa_triton.ops.catalog import FAMILIES
from nsa_triton.runtime.simulation import simulated_times
from nsa_triton.runtime.target import ascend_target
from nsa_triton.workloads import OPS, Shape, workload

from .results import write_atomically

FILE = Path(__file__).parent / "results" / "baseline.json"
COMMAND = "python -m bench.baseline"
CHIP = "Ascend910B1"
MEMORIES = ("UB", "L1", "L0C")
KINDS = ("vector", "cube", "dma")  # not "sync": the compiler counts 141 or 147 flags and waits in one kernel, by chance
SMALL = Shape("small", 8, 2, 64, 64, count=4)
TRAINED, DECODED = 128, 512  # tokens
BATCH = 2  # sequences that decode together
ALLOWED = 0.02  # what a figure may differ by

Figures = dict[str, float]
Baseline = dict[str, dict[str, Figures]]  # version of the compiler, what was looked at, its figures


def programs(version: Compiler, done: Callable[[str], None]) -> dict[str, Figures]:
    """Instructions and bytes, by kernel and case."""
    require(front_end_problem())
    jobs = dict(_jobs(version))
    reports = compile_many(list(jobs.values()), progress=lambda report: done(report.label))
    return {name: _of_report(report) for name, report in zip(jobs, reports, strict=True)}


def _jobs(version: Compiler) -> Iterator[tuple[str, Job]]:
    """Every launch of every compile case; launches that several cases share come once."""
    one, seen = chip(CHIP), set()
    target = ascend_target(one, version.version)
    for family in FAMILIES:
        for case in family.compile_cases():
            for number, launch in enumerate(case.plans(target), 1):
                spec = launch.specialization()
                if (spec.key(), repr(launch.options)) not in seen:
                    seen.add((spec.key(), repr(launch.options)))
                    name = f"{spec.name}, launch {number} of {family.name} {case.shape}"
                    yield name, Job(spec, one.name, version, launch.options, launch.ub_limit)


def _of_report(report: CompileReport) -> Figures:
    if not report.ok:
        raise CompileError(f"{report.label} by {report.compiler}: {'; '.join(report.problems())}")
    memories = {f"{memory} bytes": report.used[memory] for memory in MEMORIES}
    return {**{f"{kind} instructions": report.total(kind) for kind in KINDS}, **memories}


def cycles(version: Compiler, done: Callable[[str], None]) -> dict[str, Figures]:
    """Simulated cycles by op at one small shape, of each kernel that it launches."""
    found = {}
    for op in OPS:
        decodes = op.endswith("_infer")
        tokens, batch = (DECODED, BATCH) if decodes else (TRAINED, 1)
        work = workload(op, SMALL, tokens, batch=batch, filled=False)
        reports = simulated_times(functools.partial(work.call, "triton"), CHIP, version, fills=work.fills)
        total: Figures = {}
        for report in reports:
            name = f"simulated cycles of {report.kernel}"
            total[name] = total.get(name, 0) + round(report.us * report.cycles_per_us)
        found[f"{op} at {tokens} tokens"] = total
        done(op)
    return found


def differences(kept: Mapping[str, Mapping[str, float]], found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line per kernel or op with a figure that differs by more than ALLOWED, or that is not on both sides."""
    lines = []
    for name in dict.fromkeys((*kept, *found)):
        if name not in kept or name not in found:
            lines.append(f"{name}: only in the {'new figures' if name in found else 'baseline'}")
            continue
        old, new = kept[name], found[name]
        moved = [
            f"{figure} {old.get(figure, 0):g} -> {new.get(figure, 0):g}"
            for figure in dict.fromkeys((*old, *new))
            if abs(new.get(figure, 0) - old.get(figure, 0)) > ALLOWED * old.get(figure, 0)
        ]
        if moved:
            lines.append(f"{name}: {', '.join(moved)}")
    return lines


def read(file: Path = FILE) -> Baseline:
    kept: Baseline = json.loads(file.read_text())
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE, help="default: %(default)s")
    output: Path = parser.parse_args().output
    began = time.monotonic()
    newest = compiler()

    def done(what: str) -> None:
        print(what, file=sys.stderr, flush=True)

    found = {**programs(newest, done), **cycles(newest, done)}
    kept = read(output) if output.exists() else {}
    for line in differences(kept.get(newest.version, {}), found):
        print(line)
    write_atomically(output, json.dumps({newest.version: found}, indent=1) + "\n")
    print(f"wrote {output} after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
