"""The generated parts of README.md. `python -m tests.readme` rewrites them; test_readme.py compares."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from nsa_triton.cli.ops import LIMIT_COLUMNS, OP_COLUMNS, limit_rows, markdown, op_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CPU_TARGET = ROOT / "bench" / "results" / "cpu" / "cpu_target.csv"
PART = re.compile(r"(<!-- begin generated: (.+?) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


def _operators() -> str:
    return f"{markdown(OP_COLUMNS, op_rows([]))}\n{markdown(LIMIT_COLUMNS, limit_rows([]))}"


def _cpu_target() -> str:
    with CPU_TARGET.open(newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    return markdown(rows[0], rows[1:])


PARTS: dict[str, Callable[[], str]] = {
    "nsa-triton ops --markdown": _operators,
    "python bench/cpu_target.py": _cpu_target,
}


def regenerated(text: str) -> str:
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}{part[4]}", text)


if __name__ == "__main__":
    README.write_text(regenerated(README.read_text()))
