"""Simulated times of every kernel of every operator at the shapes of the paper, on one Ascend chip.

    python -m bench.simulated                                   # all rows; hours
    python -m bench.simulated --op nsa_compress_attention --tokens 8192 --compiler 1.2.0

Rows go into bench/results/ascend/simulated.csv, which the documents show, as soon as they are known; those of other
operators, lengths and compilers stay. No NPU is involved: docs/simulator.md says what the model knows and how wrong it
may be.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.ascend.toolchain import Compiler, compiler, compilers
from nsa_triton.runtime.executors.host import HostExecutor
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from nsa_triton.runtime.simulation import simulating
from nsa_triton.workloads import OPS, SHAPES, Workload, workload

from .results import write_table

RESULTS = Path(__file__).parent / "results" / "ascend" / "simulated.csv"
COLUMNS = (
    "operator", "tokens", "compiler", "kernel", "launches", "simulated µs", "critical pipe", "its share",
    "% of roofline", "model",
)  # fmt: skip
LENGTHS = (8192, 65536)
TIMED = 6  # launches of a kernel that stand for all of them

Row = tuple[str, ...]


class SamplingExecutor(SimulatorExecutor):
    """Times some launches of every kernel, spread over all of them, when all have been planned.

    A long sequence is worked on chunk by chunk, in launches of one program whose work grows slowly.
    """

    def __init__(self, chip: str, compiler: Compiler, fills: Iterable[str]) -> None:
        super().__init__(chip, compiler, times=True)
        self._filled = set(fills)
        self._launches: dict[str, list[tuple[Any, ...]]] = defaultdict(list)

    def launch(self, kernel: Any, programs: int, arguments: Any, constexprs: Any, options: Any) -> None:
        name = kernel.fn.__name__
        if name in self._filled:
            HostExecutor().launch(kernel, programs, arguments, constexprs, {})
        self._launches[name].append((kernel, programs, arguments, constexprs, options))

    def timed(self) -> Iterator[tuple[str, int, float, LaunchReport]]:
        """Of each kernel: name, launches, simulated µs of all of them, and the report of the middle one."""
        for name, launches in self._launches.items():
            count = len(launches)
            chosen = (
                launches if count <= TIMED else [launches[(2 * i + 1) * count // (2 * TIMED)] for i in range(TIMED)]
            )
            self.reports.clear()
            for launch in chosen:
                super().launch(*launch)
            us = sum(report.us for report in self.reports) * count / len(chosen)
            yield name, count, us, self.reports[len(chosen) // 2]


def tokens_of(work: Workload) -> str:
    length = f"{work.tokens // 1024}K"
    return f"{work.batch} × 1 of {length}" if work.op.endswith("_infer") else length


def rows(work: Workload, found: Compiler, chip: str) -> Iterator[Row]:
    executor = SamplingExecutor(chip, found, work.fills)
    with simulating(executor):
        work.call("triton")
        for name, count, us, report in executor.timed():
            share = {**report.busy, **report.shared}[report.critical]
            figures = (f"{us:.1f}", report.critical, f"{share:.0%}", f"{report.roofline:.0%}", report.model)
            yield work.op, tokens_of(work), found.version, name, str(count), *figures


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """All rows, in the order of operators, lengths and compilers; of the same operator, length and compiler the new."""
    replaced = {row[:3] for row in new}
    kept = [row for row in old if row[:3] not in replaced]
    operators = list(OPS)

    def order(row: Row) -> tuple[Any, ...]:
        known = operators.index(row[0]) if row[0] in operators else len(operators)
        return known, len(row[1]), row[1], [-int(part) for part in row[2].split(".")]

    return sorted([*kept, *new], key=order)


def read(file: Path) -> list[Row]:
    if not file.exists():
        return []
    with file.open(newline="") as text:
        head, *found = csv.reader(text)
    return [tuple(row) for row in found] if tuple(head) == COLUMNS else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--chip", default="Ascend910B2", help="default: %(default)s")
    parser.add_argument("--op", nargs="+", default=OPS, choices=OPS, metavar="OP", help="default: all")
    parser.add_argument("--tokens", nargs="+", type=int, default=LENGTHS, metavar="T", help="default: %(default)s")
    parser.add_argument("--compiler", nargs="+", help="versions of ascendnpu-ir; default: all that are found")
    options = parser.parse_args()
    chosen = [compiler(version) for version in options.compiler] if options.compiler else compilers()
    for tokens in options.tokens:
        for op in options.op:
            work = workload(op, SHAPES["paper"], tokens, filled=False)
            for found in chosen:
                new = []
                for row in rows(work, found, options.chip):
                    print(" | ".join(row), file=sys.stderr, flush=True)
                    new.append(row)
                write_table(options.output, [COLUMNS, *merged(read(options.output), new)])


if __name__ == "__main__":
    main()
