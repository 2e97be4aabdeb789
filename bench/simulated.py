"""Simulated times of every operator at the shapes of the paper, on one Ascend chip, with every compiler that is found.

    python -m bench.simulated            # rewrites bench/results/ascend/simulated.csv, which the README shows

No NPU is involved: docs/simulator.md says what the model knows and how wrong it may be.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsa_triton
from nsa_triton.ascend.simulator.report import LaunchReport
from nsa_triton.ascend.toolchain import compilers
from nsa_triton.runtime.simulation import simulated_times

RESULTS = Path(__file__).parent / "results" / "ascend" / "simulated.csv"
COLUMNS = ("operator", "tokens", "compiler", "simulated µs", "critical pipe", "its share", "% of roofline", "kernels")
TRAINING = (8192, 65536)
DECODING = (8192, 65536)
BATCH = 16
LISTS = tuple(f"select_attention_{name}" for name in ("union", "count", "place", "fill"))
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Model:
    """The model of the paper: 64 query heads in 4 groups, windows of 32, blocks of 64, 16 chosen."""

    heads: int = 64
    kv_heads: int = 4
    key_dim: int = 192
    value_dim: int = 128
    window: int = 32
    stride: int = 16
    block: int = 64
    count: int = 16
    page: int = 128


@dataclass(frozen=True)
class Case:
    operator: str
    tokens: str
    call: Callable[[], Any]
    fills: tuple[str, ...] = ()  # kernels whose results control others


def empty(*shape: int) -> Tensor:
    """Never read: the clock looks at tables and lengths only, so no page of it is ever touched."""
    return torch.empty(shape, dtype=DTYPE)


def cases(model: Model) -> Iterator[Case]:
    for tokens in TRAINING:
        yield from training_cases(model, tokens)
    yield from attention_cases(model, TRAINING[0])
    for context in DECODING:
        yield from decoding_cases(model, context)


def training_cases(model: Model, tokens: int) -> Iterator[Case]:
    x, w = empty(tokens, model.kv_heads, model.key_dim), empty(model.window, model.kv_heads)
    windows = (tokens - model.window) // model.stride + 1
    g = empty(windows, model.kv_heads, model.key_dim)
    sizes = (model.window, model.stride)
    label = f"{tokens // 1024}K"
    yield Case(
        "nsa_compress", label, lambda: nsa_triton.nsa_compress(x, w, *sizes, actual_seq_len=[tokens], impl="triton")
    )
    yield Case(
        "nsa_compress_grad",
        label,
        lambda: nsa_triton.nsa_compress_grad(g, x, w, *sizes, actual_seq_len=[tokens], impl="triton"),
    )


def attention_cases(model: Model, tokens: int) -> Iterator[Case]:
    """One sequence; blocks as `past_blocks` draws them."""
    label = f"{tokens // 1024}K"
    windows = (tokens - model.window) // model.stride + 1
    q, g = (empty(tokens, model.heads, size) for size in (model.key_dim, model.value_dim))
    k, v = (empty(windows, model.kv_heads, size) for size in (model.key_dim, model.value_dim))
    state = torch.zeros(tokens, model.heads, 8)
    scale, geometry = model.key_dim**-0.5, (model.window, model.stride)
    lengths: dict[str, Any] = {
        "actual_seq_qlen": [tokens],
        "actual_cmp_seq_kvlen": [windows],
        "causal": True,
        "impl": "triton",
    }
    yield Case(
        "nsa_compress_attention", label,
        lambda: nsa_triton.nsa_compress_attention(
            q, k, v, scale, model.heads, *geometry, model.block, model.count, num_init_blocks=1, num_local_blocks=2,
            **lengths,
        ),
    )  # fmt: skip
    yield Case(
        "nsa_compress_attention_grad", label,
        lambda: nsa_triton.nsa_compress_attention_grad(
            g, q, k, v, g, state, state, scale, model.heads, *geometry, **lengths
        ),
    )  # fmt: skip
    raw_k, raw_v = (empty(tokens, model.kv_heads, size) for size in (model.key_dim, model.value_dim))
    ids = past_blocks(tokens, model)
    chosen: dict[str, Any] = {
        "actual_seq_qlen": [tokens],
        "actual_seq_kvlen": [tokens],
        "causal": True,
        "impl": "triton",
    }
    sizes = (scale, model.heads, model.block, model.count)
    yield Case(
        "nsa_select_attention", label,
        lambda: nsa_triton.nsa_select_attention(q, raw_k, raw_v, ids, *sizes, **chosen), fills=LISTS,
    )  # fmt: skip
    yield Case(
        "nsa_select_attention_grad", label,
        lambda: nsa_triton.nsa_select_attention_grad(
            g, q, raw_k, raw_v, g, state, state, ids, *sizes, **chosen
        ), fills=LISTS,
    )  # fmt: skip


def past_blocks(tokens: int, model: Model) -> Tensor:
    """For each query token and kv head the first block, its own and the one before, and others of its past. Runs of
    eight tokens choose the same ones, as neighbours with similar queries do."""
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(tokens) // model.block
    noise = torch.rand(-(-tokens // 8), model.kv_heads, tokens // model.block, generator=generator)
    noise = noise.repeat_interleave(8, 0)[:tokens]
    blocks = torch.arange(tokens // model.block)
    noise[(blocks > own[:, None])[:, None].expand_as(noise)] = -1
    forced = (blocks == 0) | ((blocks <= own[:, None]) & (blocks > own[:, None] - 2))
    noise[forced[:, None].expand_as(noise)] = 2
    found = noise.sort(dim=-1, descending=True, stable=True)
    ids = torch.where(found.values >= 0, found.indices, -1)[..., : model.count]
    return ids.int()


def decoding_cases(model: Model, context: int) -> Iterator[Case]:
    """One new token for each of BATCH sequences, pages dealt out as they lie."""
    label = f"{BATCH} × 1 of {context // 1024}K"
    w = empty(model.window, model.kv_heads)
    q = empty(BATCH, model.heads, model.key_dim)
    raw, raw_table = cache(context, model)
    windows = (context - model.window) // model.stride + 1
    compressed, compressed_table = cache(windows, model)
    slots = torch.arange(BATCH, dtype=torch.int32)
    flat = empty(BATCH, model.kv_heads, model.key_dim)
    yield Case(
        "nsa_compress_infer", label,
        lambda: nsa_triton.nsa_compress_infer(
            raw[0], w, slots, model.window, model.stride, model.page, block_table=raw_table,
            actual_seq_len=[context] * BATCH, cache=flat, impl="triton",
        ),
    )  # fmt: skip
    head = (model.key_dim**-0.5, model.heads, model.kv_heads, model.block, model.count, model.page)
    yield Case(
        "nsa_compress_attention_infer", label,
        lambda: nsa_triton.nsa_compress_attention_infer(
            q, *compressed, *head, model.window, model.stride, block_table=compressed_table,
            actual_cmp_seq_kvlen=[windows] * BATCH, impl="triton",
        ),
    )  # fmt: skip
    ids = chosen_blocks(context, model)
    yield Case(
        "nsa_select_attention_infer", label,
        lambda: nsa_triton.nsa_select_attention_infer(
            q[:, None], *raw, ids[:, None], *head, block_table=raw_table, actual_seq_qlen=[1] * BATCH,
            actual_seq_kvlen=[context] * BATCH, impl="triton",
        ),
    )  # fmt: skip


def cache(tokens: int, model: Model) -> tuple[tuple[Tensor, Tensor], Tensor]:
    pages = -(-tokens // model.page)
    shape = (BATCH * pages, model.page, model.kv_heads)
    table = torch.arange(BATCH * pages, dtype=torch.int32).view(BATCH, pages)
    return (empty(*shape, model.key_dim), empty(*shape, model.value_dim)), table


def chosen_blocks(context: int, model: Model) -> Tensor:
    """The first block, the newest two, and others between them, different for every sequence and kv head."""
    generator = torch.Generator().manual_seed(0)
    blocks = context // model.block
    ids = torch.empty(BATCH, model.kv_heads, model.count, dtype=torch.int32)
    for row in ids.view(-1, model.count):
        others = torch.randperm(blocks - 3, generator=generator)[: model.count - 3] + 1
        row[:] = torch.cat((torch.tensor([0, blocks - 2, blocks - 1]), others))
    return ids


def row(case: Case, compiler: str, reports: list[LaunchReport]) -> tuple[str, ...]:
    total = sum(report.us for report in reports)
    slowest = max(reports, key=lambda report: report.us)
    share = {**slowest.busy, **slowest.shared}[slowest.critical]
    least = sum(report.us * report.roofline for report in reports)
    of_kernels: dict[str, float] = defaultdict(float)  # some are launched several times
    for report in reports:
        of_kernels[report.kernel] += report.us
    kernels = ", ".join(f"{kernel} {us:.1f}" for kernel, us in of_kernels.items())
    figures = (f"{total:.1f}", slowest.critical, f"{share:.0%}", f"{least / total:.0%}", kernels)
    return case.operator, case.tokens, compiler, *figures


def rows(chip: str) -> Iterator[tuple[str, ...]]:
    for case in cases(Model()):
        for compiler in compilers():
            yield row(case, compiler.version, simulated_times(case.call, chip, compiler, fills=case.fills))


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
