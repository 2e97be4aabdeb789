"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops._common.queries import query_rows
from nsa_triton.ops.sliding_window_attention_infer import reference
from nsa_triton.ops.sliding_window_attention_infer.api import nsa_sliding_window_attention_infer

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target


class Check(NamedTuple):
    layout: str
    query_tokens: tuple[int, ...]  # of each batch
    cached_tokens: tuple[int, ...]
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page: int
    window: int
    dtype: torch.dtype


CHECKS = [
    Check("BSND", (1, 1, 1), (2500, 900, 37), 64, 4, 192, 128, 128, 512, torch.bfloat16),
    Check("TND", (1, 4, 2), (700, 64, 1001), 8, 2, 128, 128, 48, 65, torch.float16),
    Check("BSND", (2, 2), (300, 129), 4, 4, 128, 128, 64, 128, torch.bfloat16),
    Check("TND", (1, 3), (65, 400), 6, 2, 65, 18, 16, 17, torch.float32),
]
# dtype, batches, heads, kv heads, key and value head size, window, page, query tokens
COMPILES = [
    (torch.bfloat16, 1, 64, 4, 192, 128, 512, 128, 1),
    (torch.float16, 32, 32, 8, 128, 128, 512, 64, 1),
    (torch.bfloat16, 4, 16, 16, 64, 64, 100, 16, 4),
    (torch.float32, 2, 8, 2, 80, 48, 257, 48, 2),
    (torch.float16, 1, 128, 1, 192, 128, 8, 64, 1),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for case in CHECKS:
        yield _check(case, device)


def _check(case: Check, device: torch.device) -> CheckCase:
    generator = torch.Generator().manual_seed(0)
    batch, tokens = len(case.query_tokens), sum(case.query_tokens)
    columns = -(-max(case.cached_tokens) // case.page)
    cache = (batch * columns, case.page, case.kv_heads)
    shapes = ((tokens, case.heads, case.key_dim), (*cache, case.key_dim), (*cache, case.value_dim))
    q, k, v = (torch.randn(shape, generator=generator).to(case.dtype).to(device) for shape in shapes)
    table = torch.randperm(batch * columns, generator=generator).view(batch, columns).int()
    for row, cached, queries in zip(table, case.cached_tokens, case.query_tokens, strict=True):
        row[: max(0, cached - queries + 1 - case.window) // case.page] = -1  # pages that were given away
    table, lengths = table.to(device), torch.tensor(case.cached_tokens, dtype=torch.int32)
    rows = query_rows(case.query_tokens, "TND", q.cpu(), batch)
    scale = case.key_dim**-0.5

    def run() -> tuple[Tensor, ...]:
        layout = case.layout
        results = nsa_sliding_window_attention_infer(
            q if layout == "TND" else q.view(batch, -1, *q.shape[1:]),
            k,
            v,
            *(scale, case.heads, case.kv_heads, case.window, case.page),
            layout=layout,
            block_table=table,
            actual_seq_qlen=case.query_tokens,
            actual_seq_kvlen=case.cached_tokens,
            return_lse=True,
            impl="triton",
        )
        return tuple(result if layout == "TND" else result.flatten(0, 1) for result in results)

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        converted = (convert(q), convert(k), convert(v), table, lengths, rows, scale, case.window)
        output, _ = reference.forward(*converted, precision=converted[0].dtype)
        return output, reference.forward(*converted)[1]

    shape = (
        f"{case.layout} B={batch} T={tokens} N={case.heads}/{case.kv_heads} D={case.key_dim}/{case.value_dim} "
        f"page={case.page} W={case.window}"
    )
    terms = case.key_dim + case.window
    names = ("output", "lse")
    return CheckCase("nsa_sliding_window_attention_infer", shape, case.dtype, names, (terms, terms), run, expected)


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, batch, heads, kv_heads, key_dim, value_dim, window, page, tokens = arguments
        yield CompileCase(
            "sliding_window_attention_infer",
            f"{str(dtype).removeprefix('torch.')} B={batch} S={tokens} N={heads}/{kv_heads} D={key_dim}/{value_dim} "
            f"page={page} W={window}",
            functools.partial(_plans, arguments),
        )


def _plans(arguments: tuple[torch.dtype, int, int, int, int, int, int, int, int], target: Target) -> list[Launch]:
    from nsa_triton.ops.sliding_window_attention_infer import launch  # imports triton

    return launch.compile_plans(target, *arguments)
