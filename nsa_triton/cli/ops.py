"""List the ops: their vendor twins, dtypes, gradients and limits.

The support matrix is generated from the code; `--markdown` prints the tables that the README holds.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from rich.table import Table

from nsa_triton.cli.view import console, print_json
from nsa_triton.limits import LIMITS
from nsa_triton.ops.catalog import families

EXAMPLE = "nsa-triton ops nsa_compress"

OP_COLUMNS = ("nsa_triton", "torch_npu", "computes", "dtypes", "differentiable in", "beyond CANN")
LIMIT_COLUMNS = ("op", "argument", "limit", "CANN documents")
NAMES = ("nsa_triton", "torch_npu", "op", "argument")  # columns that a narrow terminal must not break
Rows = list[tuple[str, ...]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", nargs="*", help="op families or functions (default: all)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")


def run(options: argparse.Namespace) -> int:
    chosen = families(options.op)
    if options.json:
        print_json([asdict(op) for family in chosen for op in family.ops])
    elif options.markdown:
        print(markdown(OP_COLUMNS, op_rows(options.op)), markdown(LIMIT_COLUMNS, limit_rows(options.op)), sep="\n")
    else:
        console().print(_table("ops", OP_COLUMNS, op_rows(options.op)))
        console().print(_table("limits", LIMIT_COLUMNS, limit_rows(options.op)))
    return 0


def op_rows(names: list[str]) -> Rows:
    return [
        (op.name, op.vendor, op.does, op.dtypes, op.differentiable, op.beyond)
        for family in families(names)
        for op in family.ops
    ]


def limit_rows(names: list[str]) -> Rows:
    vendors = {op.name: op.vendor for family in families(names) for op in family.ops}
    texts = [(limit, limit.structural.text(), limit.documented.text()) for limit in LIMITS if limit.op in vendors]
    return [
        (limit.op, limit.argument, ours, _documented(ours, theirs, vendors[limit.op])) for limit, ours, theirs in texts
    ]


def _documented(ours: str, theirs: str, vendor: str) -> str:
    if vendor == "–":  # CANN has no such operator
        return "–"
    return "the same" if ours == theirs else theirs


def markdown(columns: tuple[str, ...], rows: Rows) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _table(title: str, columns: tuple[str, ...], rows: Rows) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column in NAMES)
    for row in rows:
        table.add_row(*row)
    return table
