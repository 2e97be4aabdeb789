"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common import block_scores
from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.compress_attention_infer import reference
from nsa_triton.ops.compress_attention_infer.api import nsa_compress_attention_infer

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target


class Check(NamedTuple):
    layout: str
    query_tokens: int  # of each batch; where there are several, the first does not see the last compressed token
    cached_tokens: tuple[int, ...]  # compressed tokens of each batch
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page: int
    window: tuple[int, int]  # length and stride
    block_size: int
    block_count: int
    importance: str
    dtype: torch.dtype


CHECKS = [
    Check("TND", 1, (300, 77), 64, 4, 192, 128, 128, (32, 16), 64, 16, "cann", torch.bfloat16),
    Check("BSND", 3, (130, 47, 1), 8, 2, 128, 128, 48, (48, 16), 48, 8, "overlap", torch.float16),
    Check("TND", 1, (0, 700, 33), 4, 4, 64, 64, 64, (32, 32), 32, 16, "cann", torch.bfloat16),
    Check("TND", 1, (200, 17), 14, 2, 65, 18, 16, (32, 16), 64, 6, "cann", torch.float32),
]
# dtype, batches, heads, kv heads, key and value head size, window, stride, block, count, page, query tokens, longest
COMPILES = [
    (torch.bfloat16, 1, 64, 4, 192, 128, 32, 16, 64, 16, 128, 1, 4096),
    (torch.float16, 20, 32, 8, 128, 128, 32, 16, 64, 16, 64, 1, 8192),
    (torch.bfloat16, 4, 16, 16, 64, 64, 32, 32, 32, 8, 16, 4, 512),
    (torch.float32, 2, 8, 2, 80, 48, 48, 16, 48, 4, 48, 2, 1024),
    (torch.float16, 1, 128, 1, 192, 128, 64, 32, 128, 32, 64, 1, 4096),
    (torch.float16, 1, 32, 1, 65, 18, 32, 16, 32, 397, 48, 1, 1200),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for case in CHECKS:
        yield _check(case, device)


def _check(case: Check, device: torch.device) -> CheckCase:
    generator = torch.Generator().manual_seed(0)
    batch, several = len(case.cached_tokens), case.query_tokens > 1
    tokens, columns = batch * case.query_tokens, -(-max(case.cached_tokens) // case.page)
    cache = (batch * columns, case.page, case.kv_heads)
    shapes = ((tokens, case.heads, case.key_dim), (*cache, case.key_dim), (*cache, case.value_dim))
    q, k, v = (torch.randn(shape, generator=generator).to(case.dtype).to(device) for shape in shapes)
    table = torch.randperm(batch * columns, generator=generator).view(batch, columns).int().to(device)
    length, stride = case.window
    raw = [(cached - 1) * stride + length + 1 for cached in case.cached_tokens] if several else None
    lengths, raw_lengths = _int32(case.cached_tokens, device), None if raw is None else _int32(raw, device)
    scale = case.key_dim**-0.5
    # The same ids need not come out of another order of summation: what is judged is the score of each place.
    exact = reference.scores(
        q.double(),
        k.double(),
        v.double(),
        table,
        lengths,
        None,
        raw_lengths,
        scale,
        *case.window,
        case.block_size,
        case.importance,
    )

    def run() -> tuple[Tensor, ...]:
        queries = q if case.layout == "TND" else q.view(batch, -1, *q.shape[1:])
        output, ids = nsa_compress_attention_infer(
            queries,
            k,
            v,
            scale,
            case.heads,
            case.kv_heads,
            case.block_size,
            case.block_count,
            case.page,
            *case.window,
            layout=case.layout,
            atten_mask=torch.ones(1, dtype=torch.bool, device=device) if several else None,
            block_table=table,
            actual_cmp_seq_kvlen=case.cached_tokens,
            actual_sel_seq_kvlen=raw,
            importance=case.importance,
            impl="triton",
        )
        return output.view(tokens, *output.shape[-2:]), scores_at(ids.view(tokens, *ids.shape[-2:]), exact)

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        tensors = (convert(q), convert(k), convert(v), table, lengths, None, raw_lengths)
        sizes = (*case.window, case.block_size, case.block_count)
        output, ids = reference.forward(*tensors, scale, *sizes, case.importance, precision=tensors[0].dtype)
        return output, scores_at(ids, exact)

    shape = (
        f"{case.layout} B={batch} T={tokens} N={case.heads}/{case.kv_heads} D={case.key_dim}/{case.value_dim} "
        f"page={case.page} l={length} d={stride} l'={case.block_size} K={case.block_count} {case.importance}"
    )
    terms = case.key_dim + max(case.cached_tokens)
    names = ("output", "scores of the ids")
    return CheckCase("nsa_compress_attention_infer", shape, case.dtype, names, (terms, terms), run, expected)


def scores_at(ids: Tensor, scores: list[Tensor]) -> Tensor:
    """The scores [T, N2, K] of ids [T, N2, K], where batches have equally many query tokens."""
    owned = ids.chunk(len(scores))
    return torch.cat([block_scores.scores_at(own, known) for own, known in zip(owned, scores, strict=True)])


def _int32(values: list[int] | tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, batch, heads, kv_heads, key_dim, value_dim, length, stride, block, count, page, tokens, _ = arguments
        yield CompileCase(
            "compress_attention_infer",
            f"{str(dtype).removeprefix('torch.')} B={batch} S={tokens} N={heads}/{kv_heads} D={key_dim}/{value_dim} "
            f"page={page} l={length} d={stride} l'={block} K={count}",
            functools.partial(_plans, arguments),
        )


def _plans(
    arguments: tuple[torch.dtype, int, int, int, int, int, int, int, int, int, int, int, int], target: Target
) -> list[Launch]:
    from nsa_triton.ops.compress_attention_infer import launch  # imports triton

    return launch.compile_plans(target, *arguments)
