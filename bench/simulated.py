"""Simulated times of every operator at the shapes of the paper, on one Ascend chip, with every compiler that is found.

    python -m bench.simulated            # rewrites bench/results/ascend/simulated.csv, which the README shows

No NPU is involved: docs/simulator.md says what the model knows and how wrong it may be.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.ascend.toolchain import compilers
from nsa_triton.runtime.simulation import simulated_times
from nsa_triton.workloads import OPS, SHAPES, Workload, workload

RESULTS = Path(__file__).parent / "results" / "ascend" / "simulated.csv"
COLUMNS = ("operator", "tokens", "compiler", "simulated µs", "critical pipe", "its share", "% of roofline", "kernels")
TRAINING = (8192, 65536)
DECODING = (8192, 65536)
TRAINING_OPS = ("nsa_compress", "nsa_compress_grad")
ATTENTION_OPS = tuple(op for op in OPS if op not in TRAINING_OPS and not op.endswith("_infer"))
DECODING_OPS = tuple(op for op in OPS if op.endswith("_infer"))


def workloads() -> Iterator[Workload]:
    """Training attention at the shorter length only, where the simulator already takes minutes."""
    for tokens in TRAINING:
        yield from at(tokens, TRAINING_OPS)
    yield from at(TRAINING[0], ATTENTION_OPS)
    for context in DECODING:
        yield from at(context, DECODING_OPS)


def at(tokens: int, ops: tuple[str, ...]) -> Iterator[Workload]:
    for op in ops:
        yield workload(op, SHAPES["paper"], tokens, filled=False)


def row(work: Workload, compiler: str, reports: list[LaunchReport]) -> tuple[str, ...]:
    total = sum(report.us for report in reports)
    slowest = max(reports, key=lambda report: report.us)
    share = {**slowest.busy, **slowest.shared}[slowest.critical]
    least = sum(report.us * report.roofline for report in reports)
    of_kernels: dict[str, float] = defaultdict(float)  # some are launched several times
    for report in reports:
        of_kernels[report.kernel] += report.us
    kernels = ", ".join(f"{kernel} {us:.1f}" for kernel, us in of_kernels.items())
    figures = (f"{total:.1f}", slowest.critical, f"{share:.0%}", f"{least / total:.0%}", kernels)
    length = f"{work.tokens // 1024}K"
    tokens = f"{work.batch} × 1 of {length}" if work.op in DECODING_OPS else length
    return work.op, tokens, compiler, *figures


def rows(chip: str) -> Iterator[tuple[str, ...]]:
    for work in workloads():
        call = functools.partial(work.call, "triton")
        for compiler in compilers():
            yield row(work, compiler.version, simulated_times(call, chip, compiler, fills=work.fills))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--chip", default="Ascend910B2", help="default: %(default)s")
    options = parser.parse_args()
    table: list[tuple[str, ...]] = [COLUMNS]
    for found in rows(options.chip):
        print(" | ".join(found), file=sys.stderr, flush=True)
        table.append(found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=options.output.parent, delete=False, newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    Path(file.name).replace(options.output)


if __name__ == "__main__":
    main()
