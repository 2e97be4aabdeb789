"""The generated parts of both READMEs and of docs/. `python -m tests.readme` rewrites them; test_readme.py compares."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.baseline import KINDS
from nsa_triton.ascend.simulator.costs import parameters
from nsa_triton.cli.ops import OP_COLUMNS, markdown, op_rows
from nsa_triton.ops.catalog import FAMILIES, Family
from nsa_triton.workloads import BATCH, SHAPES

from . import op_pages
from .chinese import translated

ROOT = Path(__file__).parent.parent
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
OPS = ROOT / "docs" / "ops"
OP_PAGES = {family: OPS / f"{family.name}.md" for family in FAMILIES}
PAGES = (
    README,
    CHINESE,
    ROOT / "docs" / "simulator.md",
    ROOT / "docs" / "kernels.md",
    ROOT / "docs" / "tuning.md",
    *OP_PAGES.values(),
)
RESULTS = ROOT / "bench" / "results"
PART = re.compile(r"(<!-- begin generated: (.+?) -->\n)(.*?)(<!-- end generated -->)", re.DOTALL)


def _operators() -> str:
    return markdown(OP_COLUMNS, op_rows([]))


def _table(name: str) -> str:
    with (RESULTS / name).open(newline="") as file:
        rows = [tuple(row) for row in csv.reader(file)]
    return markdown(rows[0], rows[1:])


def _parameters() -> str:
    """The timing model of the simulator: value, unit, uncertainty and source of each parameter."""
    model = parameters()
    rows: list[tuple[str, ...]] = [
        (
            name.replace("_", " "),
            str(entry["value"]),
            entry["unit"],
            f"{entry['uncertainty_percent']} %",
            entry["source"],
        )
        for name, entry in model["parameters"].items()
    ]
    chips: list[tuple[str, ...]] = [
        (name, *(str(chip[what]) for what in ("clock_mhz", "hbm_gb_per_s", "l2_mib")))
        for name, chip in model["chips"].items()
    ]
    operations: list[tuple[str, ...]] = [
        (name.replace("_", " "), *map(str, costs)) for name, costs in model["operations"].items()
    ]
    tables = (
        markdown(("chip", "clock, MHz", "HBM, GB/s", "L2, MiB"), chips),
        markdown(("parameter", "value", "unit", "uncertain by", "source"), rows),
        markdown(("vector operation", "cycles per repeat of 256 bytes", "more cycles of latency"), operations),
    )
    return f"Model version {model['version']}.\n\n" + "\n".join(tables)


def _simulated(operators: tuple[str, ...] = ()) -> str:
    """One row per operator (of all, or of those named) and length: the sum over its kernels with each compiler, and
    what the slowest kernel waits for with the newest one."""
    with (RESULTS / "ascend" / "simulated.csv").open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["operator"] in operators or not operators]
    compilers = list(dict.fromkeys(row["compiler"] for row in found))
    rows: list[tuple[str, ...]] = []
    for operator, tokens in dict.fromkeys((row["operator"], row["tokens"]) for row in found):
        own = [row for row in found if (row["operator"], row["tokens"]) == (operator, tokens)]
        sums = []
        for compiler in compilers:
            times = [float(row["simulated µs"]) for row in own if row["compiler"] == compiler]
            sums.append(f"{sum(times):.1f}" if times else "–")
        slowest = max(own, key=lambda row: (row["compiler"] == own[0]["compiler"], float(row["simulated µs"])))
        waits = f"{slowest['kernel']}: {slowest['critical pipe']} {slowest['its share']}"
        rows.append((operator, tokens, *sums, waits))
    return markdown(("operator", "tokens", *(f"µs, {name}" for name in compilers), "slowest kernel, its busiest"), rows)


def _simulated_family(family: Family) -> str:
    """The same of one family, and what was simulated."""
    table = _simulated(tuple(op.name for op in family.ops))
    if table.count("\n") == 2:  # no row
        return "No simulated time is recorded, and none was measured on an NPU.\n"
    shape = SHAPES["paper"]
    label = (
        "**Simulated on Ascend910B2, not measured**, by both Ascend compilers, at the paper's shape: "
        f"{shape.heads} query heads, {shape.kv_heads} kv heads of {shape.key_dim}/{shape.value_dim}, windows of "
        f"{shape.window} every {shape.stride} tokens, {shape.count} blocks of {shape.block}, a sliding window of "
        f"{shape.local}, bf16; training operators one sequence, decoding operators one new token of each of {BATCH} "
        "([how, and how wrong it may be](../simulator.md); [kernel by kernel](../kernels.md))."
    )
    return f"{op_pages.paragraph(label)}\n\n{table}"


def _instructions() -> str:
    """Of the training attention kernels at the paper's shape: instructions by kind and on-chip memory."""
    kept = json.loads((RESULTS / "baseline.json").read_text())
    (figures,) = kept.values()
    rows = []
    for name, found in figures.items():
        kernel, _, case = name.partition(", launch ")
        _, _, of_op = case.partition(" of ")
        if "attention bfloat16 N=64/4 D=192/128" in case and "infer" not in case:
            ub = f"{found['UB bytes'] / 1024:.0f} KiB"
            rows.append((of_op.split()[0], kernel, *(f"{found[f'{kind} instructions']:g}" for kind in KINDS), ub))
    return markdown(("operator", "kernel", *KINDS, "unified buffer"), rows)


def _mutations() -> str:
    """Detection by kind of mutation, over all kernels and compilers."""
    with (RESULTS / "ascend" / "simulator_mutations.csv").open(newline="") as file:
        found = [(row["kind"], row["detected by"], int(row["count"])) for row in csv.DictReader(file)]
    rows: list[tuple[str, ...]] = []
    for kind in sorted({kind for kind, _, _ in found}):
        own = [(by, count) for other, by, count in found if other == kind]
        total = sum(count for _, count in own)
        unflagged: Counter[str] = Counter()
        for by, count in own:
            if by.startswith("unflagged"):
                unflagged[by.partition(": ")[2]] += count
        why = "; ".join(f"{count} × {reason}" for reason, count in unflagged.most_common())
        rows.append((kind, str(total), f"{1 - unflagged.total() / total:.0%}", why or "–"))
    everything = sum(count for *_, count in found)
    missed = sum(count for _, by, count in found if by.startswith("unflagged"))
    rows.append(("all", str(everything), f"{1 - missed / everything:.0%}", ""))
    return markdown(("mutation", "tried", "detected", "not flagged, and why"), rows)


def _tuned() -> str:
    """Of every kernel, shape and target that has a tuned entry: how many times as fast as the default."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    targets = set()
    for file in sorted((ROOT / "autotune_configs").glob("*/*.json")):
        target = file.parent.name
        if target == "default":
            continue
        targets.add(target)
        for entry in json.loads(file.read_text())["entries"]:
            evidence, work = entry["evidence"], entry["evidence"]["workload"]
            compiler = f"ascendnpu-ir {entry['key']['compiler']}" if "compiler" in entry["key"] else ""
            call = (file.stem, entry["kernel"], f"{work['shape']}, {work['tokens']} tokens, {work['dtype']}", compiler)
            ratio = f"{evidence['default_us'] / evidence['us']:.2f}" if evidence["default_us"] else "∞"
            found.setdefault(call, {})[target] = ratio
    columns = sorted(targets)
    rows = [(*call, *(ratios.get(target, "–") for target in columns)) for call, ratios in sorted(found.items())]
    return markdown(("op", "kernel", "tuned for", "compiler", *columns), rows)


PARTS: dict[str, Callable[[], str]] = {
    "autotune_configs": _tuned,
    "nsa-triton ops": _operators,
    "python -m bench.cpu_target": functools.partial(_table, "cpu/cpu_target.csv"),
    "nsa_triton/ascend/simulator/chips.json": _parameters,
    "python -m bench.simulated": _simulated,
    "python -m bench.simulated, kernels": functools.partial(_table, "ascend/simulated.csv"),
    "python -m bench.simulated, before": functools.partial(_table, "ascend/simulated_before.csv"),
    "python -m bench.baseline": _instructions,
    "python -m bench.simulator_published": functools.partial(_table, "ascend/simulator_published.csv"),
    "python -m bench.simulator_mutations": _mutations,
    "python -m bench.decode_bytes": functools.partial(_table, "ascend/decode_bytes.csv"),
}
for _family in FAMILIES:
    PARTS |= op_pages.parts(_family)
    PARTS[op_pages.part_name(_family, "simulated")] = functools.partial(_simulated_family, _family)


def regenerated(page: Path) -> str:
    """The text of a page, with its generated parts as they are now."""

    def part(found: re.Match[str]) -> str:
        text = PARTS[found[2]]()
        return f"{found[1]}{translated(text) if page == CHINESE else text}{found[4]}"

    return PART.sub(part, page.read_text())


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(regenerated(page))
