"""Bytes that the paged operators move per decoded token, counted in the compiled programs, against dense attention.

Every kernel is compiled for an Ascend chip. A transfer of the final on-chip program moves so many bytes, and how often
its loops turn follows from the shape: their product, over all transfers between the chip and tensors, is what is
printed. Nothing is measured. Traffic between the cores of a block and scalars such as page ids are not counted; what
stands outside of the loops, one table of constants that all programs read, counts once.

    python -m bench.decode_bytes            # rewrites bench/results/ascend/decode_bytes.csv, which the README shows
"""

from __future__ import annotations

import argparse
import linecache
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import nsa_triton
from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import compile_kernel
from nsa_triton.ascend.hivm_facts import Transfer
from nsa_triton.ops.compress_attention_infer import launch as compress_attention
from nsa_triton.ops.compress_infer import launch as compress
from nsa_triton.ops.select_attention_infer import launch as select_attention
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import ascend_target

from .results import write_table

RESULTS = Path(__file__).parent / "results" / "ascend" / "decode_bytes.csv"
COLUMNS = (
    "context", "dense attention", "all three operators", "dense ÷ all three",
    "compressed attention", "× (K + V + q + out + ids)", "selected attention", "compression",
)  # fmt: skip
CONTEXTS = (4096, 8192, 16384, 32768, 65536)
OPS = Path(nsa_triton.__file__).parent / "ops"


@dataclass(frozen=True)
class Shape:
    """The model of the paper, one sequence: 64 query heads in 4 groups, windows of 32, blocks of 64, 16 chosen."""

    heads: int = 64
    kv_heads: int = 4
    key_dim: int = 192
    value_dim: int = 128
    window: int = 32
    stride: int = 16
    block: int = 64
    count: int = 16
    page: int = 128
    dtype: torch.dtype = torch.bfloat16

    def dense(self, tokens: int) -> int:
        """Keys, values, query and output of attention over that many tokens."""
        elements = tokens * self.kv_heads + self.heads
        return elements * (self.key_dim + self.value_dim) * self.dtype.itemsize


def loop_variables(transfer: Transfer) -> list[str]:
    """The variables of the loops around a transfer, as the kernel's source names them.

    Where the compiler overlaps cube and vector work, it makes two loops of one, both on the same line of the source.
    """
    found = []
    for place in dict.fromkeys(transfer.loops):
        file, _, line = place.rpartition(":")
        match = re.search(r"for (\w+) in", linecache.getline(str(OPS / file), int(line)))
        if match is None:
            raise SystemExit(f"{place} is not the line of a loop")
        found.append(match[1])
    return found


def moved(launch: Launch, chip_name: str, turns: Mapping[str, float]) -> float:
    """Bytes of one launch; `turns` says how often each loop turns, each time that it is entered."""
    report = compile_kernel(launch.specialization(), chip_name, options=launch.options)
    if not report.ok:
        raise SystemExit(f"{report.label}: {report.problems()}")
    total = 0.0
    for transfer in report.transfers:
        times = 1.0
        for variable in loop_variables(transfer):
            times *= turns[variable]
        total += transfer.bytes * times
    return total


def compressed_attention_bytes(shape: Shape, context: int, chip_name: str) -> tuple[float, int]:
    """What the two launches move, and the keys, values, query, output and ids that must be moved."""
    one = chip(chip_name)
    tokens = (context - shape.window) // shape.stride + 1
    split, choose, _ = compress_attention.compile_plans(
        ascend_target(one), shape.dtype, 1, shape.heads, shape.kv_heads,
        shape.key_dim, shape.value_dim, shape.window, shape.stride, shape.block, shape.count, shape.page, 1, tokens,
    )  # fmt: skip
    tiles = -(-tokens // split.constexprs["CUT"])
    items, splits = int(split.arguments["n_items"]), split.constexprs["SPLITS"]
    first = moved(split, chip_name, {"i_item": items, "i_t": 1, "i_tile": tiles / splits})
    # The mask of a tile of tiles leaves the rows that are there.
    turns = {
        "i_item": shape.kv_heads,
        "i_t": 1,
        "i_g": shape.heads // shape.kv_heads,
        "i_tile": tiles / choose.constexprs["BT"],
        "i_s": -(-splits // choose.constexprs["BP"]),
    }
    least = shape.dense(tokens) + 4 * shape.kv_heads * shape.count
    return first + moved(choose, chip_name, turns), least


def selected_attention_bytes(shape: Shape, context: int, chip_name: str) -> float:
    one = chip(chip_name)
    split, *join = select_attention.compile_plans(
        ascend_target(one), shape.dtype, 1, shape.heads, shape.kv_heads,
        shape.key_dim, shape.value_dim, shape.block, shape.count, shape.page, 1,
    )  # fmt: skip
    constexprs = split.constexprs
    pieces = constexprs["K"] * constexprs["PIECES"] / constexprs["SPLITS"]
    total = moved(split, chip_name, {"i_item": int(split.arguments["n_items"]), "i_t": 1, "i_piece": pieces})
    for launch in join:
        parts = -(-constexprs["SPLITS"] // launch.constexprs["BP"])
        total += moved(launch, chip_name, {"i_item": shape.heads, "i_t": 1, "i_s": parts})
    return total


def compression_bytes(shape: Shape, chip_name: str) -> float:
    """Of keys and values; a token in `stride` completes a window."""
    one = chip(chip_name)
    target = ascend_target(one)
    total = 0.0
    for size in (shape.key_dim, shape.value_dim):
        (launch,) = compress.compile_plans(
            target, shape.dtype, shape.kv_heads, size, shape.window, shape.stride, shape.page, batch=1
        )
        pieces = shape.window // launch.constexprs["C"]
        turns = {"i_item": int(launch.arguments["n_items"]), "i_r": 1 / shape.stride, "i_l": pieces}
        total += moved(launch, chip_name, turns)
    return total


def kilobytes(count: float) -> str:
    return f"{count / 1024:,.0f} KiB"


def rows(shape: Shape, chip_name: str) -> list[tuple[str, ...]]:
    compression = compression_bytes(shape, chip_name)
    found: list[tuple[str, ...]] = []
    for context in CONTEXTS:
        print(f"context {context}", flush=True)
        compressed, least = compressed_attention_bytes(shape, context, chip_name)
        selected = selected_attention_bytes(shape, context, chip_name)
        total, dense = compressed + selected + compression, shape.dense(context)
        figures = (kilobytes(dense), kilobytes(total), f"{dense / total:.1f}", kilobytes(compressed))
        found.append(
            (f"{context:,}", *figures, f"{compressed / least:.2f}", kilobytes(selected), kilobytes(compression))
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--chip", default="Ascend910B2", help="default: %(default)s")
    options = parser.parse_args()
    table = rows(Shape(), options.chip)
    write_table(options.output, [COLUMNS, *table])
    for row in (COLUMNS, *table):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
