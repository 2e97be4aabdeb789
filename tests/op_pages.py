"""The generated parts of docs/ops: what docstrings, limits.py, the catalog and the configs say of an op family."""

from __future__ import annotations

import doctest
import functools
import inspect
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import nsa_triton
from nsa_triton.cli.ops import LIMIT_COLUMNS, OP_COLUMNS, limit_rows, markdown, op_rows
from nsa_triton.ops.catalog import Family
from nsa_triton.runtime.configs import config_root

HEADING = re.compile(r"(Args|Returns|Raises|Example):")
WIDTH = 120
NO_TWIN = "–"  # how the catalog says that CANN has no such operator


def functions_of(family: Family) -> list[Callable[..., Any]]:
    return [getattr(nsa_triton, op.name) for op in family.ops]


def has_twin(family: Family) -> bool:
    return family.ops[0].vendor != NO_TWIN


def summary(family: Family) -> str:
    return markdown(OP_COLUMNS, op_rows([family.name]))


# ---- functions ----


def function_texts(family: Family) -> str:
    """Signature and docstring of every function, without its example."""
    return "\n".join(map(_function, functions_of(family)))


def _function(function: Callable[..., Any]) -> str:
    parts = docstring_parts(function)
    blocks = [
        f"### {function.__name__}",
        f"```python\n{signature(function)}\n```",
        parts[""],
        f"**Arguments**\n\n{_list(parts['Args'])}",
        paragraph(f"**Returns** {parts['Returns']}"),
        f"**Raises**{_raises(parts['Raises'])}",
    ]
    return "\n\n".join(blocks) + "\n"


def docstring_parts(function: Callable[..., Any]) -> dict[str, str]:
    """The description, as "", and the text under each heading. A paragraph between headings is part of the former."""
    lines: dict[str, list[str]] = {"": []}
    part = ""
    for line in inspect.cleandoc(function.__doc__ or "").splitlines():
        heading = HEADING.fullmatch(line)
        if heading or (line and not line[0].isspace()):
            part = heading[1] if heading else ""
        if not heading:
            lines.setdefault(part, []).append(line)
    return {part: textwrap.dedent("\n".join(own)).strip() for part, own in lines.items()}


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def signature(function: Callable[..., Any]) -> str:
    """One parameter per line; annotations as they are written."""
    found = inspect.signature(function)
    lines: list[str] = []
    for parameter in found.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and "*" not in lines:
            lines.append("*")
        lines.append(f"{parameter.name}: {parameter.annotation}{_default(parameter.default)}")
    body = "".join(f"    {line},\n" for line in lines)
    return f"{function.__name__}(\n{body}) -> {found.return_annotation}"


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return ""
    return f' = "{value}"' if isinstance(value, str) else f" = {value}"


def entries(section: str) -> Iterator[tuple[str, str]]:
    """`names: text` of each entry of a section; lines that go on are indented."""
    for line in re.sub(r"\n +", " ", section).splitlines():
        names, _, text = line.partition(": ")
        yield names, text


def _list(section: str) -> str:
    return "\n".join(
        paragraph(f"* {', '.join(f'`{name}`' for name in names.split(', '))}: {text}", indent="  ")
        for names, text in entries(section)
    )


def _raises(section: str) -> str:
    """A list of errors, or a sentence that names those of another function."""
    return f"\n\n{_list(section)}" if section.startswith("Argument") else f" {section}"


def paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# ---- limits ----


def limits(family: Family) -> str:
    """The rows of limits.py. What CANN documents is left out where CANN has no such operator."""
    rows = limit_rows([family.name])
    (limited,) = {row[0] for row in rows}
    others = [op.name for op in family.ops if op.name != limited]
    first, last = 1, len(LIMIT_COLUMNS) if has_twin(family) else len(LIMIT_COLUMNS) - 1
    table = markdown(LIMIT_COLUMNS[first:last], [row[first:last] for row in rows])
    holds = f"Of `{limited}`" + "".join(f" and `{name}`" for name in others)
    return paragraph(f"{holds}; {_head_sizes(family)}.") + f"\n\n{table}"


def _head_sizes(family: Family) -> str:
    largest = largest_head_size(family)
    if largest == math.inf:
        return "tiles are shipped for all head sizes"
    wanted = "larger ones need a [config](../../autotune_configs/README.md)"
    return f"tiles are shipped for head sizes up to {largest:g}, {wanted}"


def largest_head_size(family: Family) -> float:
    """The largest for which every kernel has a default config."""
    largest: dict[str, float] = {}
    for entry in json.loads((config_root() / "default" / f"{family.name}.json").read_text())["entries"]:
        size = entry["key"].get("head_dim", {"max": math.inf})["max"]
        largest[entry["kernel"]] = max(largest.get(entry["kernel"], 0), size)
    return min(largest.values())


# ---- example ----


def example(family: Family) -> str:
    """The examples of the docstrings, one after the other, without prompts; what an expression gives is a comment."""
    lines = [imports(family), ""]
    for step in steps(family):
        lines += [step.source.rstrip(), *(f"# {line}" for line in step.want.splitlines())]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def imports(family: Family) -> str:
    return f"import torch\nfrom nsa_triton import {', '.join(op.name for op in family.ops)}"


def steps(family: Family) -> Iterator[doctest.Example]:
    for function in functions_of(family):
        yield from doctest.DocTestParser().get_examples(docstring_parts(function)["Example"])


def parts(family: Family) -> dict[str, Callable[[], str]]:
    """By the names that the pages give them."""
    kinds = {"summary": summary, "functions": function_texts, "limits": limits, "example": example}
    return {part_name(family, kind): functools.partial(make, family) for kind, make in kinds.items()}


def part_name(family: Family, kind: str) -> str:
    return f"nsa_triton/ops/{family.name}, {kind}"
