"""The generated parts of README.md. `python -m tests.readme` rewrites them; test_readme.py compares."""

from __future__ import annotations

import csv
import functools
import re
from collections.abc import Callable
from pathlib import Path

from nsa_triton.cli.ops import LIMIT_COLUMNS, OP_COLUMNS, limit_rows, markdown, op_rows

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
PART = re.compile(r"(<!-- begin generated: (.+?) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


def _operators() -> str:
    return f"{markdown(OP_COLUMNS, op_rows([]))}\n{markdown(LIMIT_COLUMNS, limit_rows([]))}"


def _table(name: str) -> str:
    with (RESULTS / name).open(newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    return markdown(rows[0], rows[1:])


PARTS: dict[str, Callable[[], str]] = {
    "nsa-triton ops --markdown": _operators,
    "python -m bench.cpu_target": functools.partial(_table, "cpu/cpu_target.csv"),
    "python -m bench.decode_bytes": functools.partial(_table, "ascend/decode_bytes.csv"),
}


def regenerated(text: str) -> str:
    return PART.sub(lambda part: f"{part[1]}{PARTS[part[2]]()}{part[4]}", text)


if __name__ == "__main__":
    README.write_text(regenerated(README.read_text()))
