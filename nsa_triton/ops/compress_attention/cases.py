"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.block_scores import scores_at
from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.compress_attention import reference
from nsa_triton.ops.compress_attention.api import nsa_compress_attention, nsa_compress_attention_grad

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target


class Check(NamedTuple):
    queries: tuple[int, ...]  # query tokens of each segment
    keys: tuple[int, ...]  # compressed tokens of each segment
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: tuple[int, int]  # length and stride
    block_size: int
    block_count: int
    importance: str
    dtype: torch.dtype
    forced: tuple[int, int] | None = None  # initial and local blocks of a causal call; None: both masks are given


CHECKS = [
    Check((200, 0, 77), (11, 0, 3), 16, 1, 192, 128, (32, 16), 64, 16, "cann", torch.bfloat16, (1, 2)),
    Check((130, 31, 33), (7, 0, 1), 8, 2, 128, 128, (48, 16), 48, 4, "overlap", torch.float16, (0, 0)),
    Check((70, 1, 64), (40, 3, 65), 4, 4, 64, 64, (16, 16), 16, 8, "cann", torch.bfloat16),
    Check((65, 100), (33, 18), 10, 2, 65, 18, (48, 32), 96, 5, "cann", torch.float32),
]
# dtype, heads, kv heads, key and value head size, window, stride, block, count, causal, masked
COMPILES = [
    (torch.bfloat16, 64, 4, 192, 128, 32, 16, 64, 16, True, False),
    (torch.float16, 32, 8, 128, 128, 32, 16, 64, 16, True, False),
    (torch.bfloat16, 16, 16, 64, 64, 16, 16, 16, 8, True, False),
    (torch.bfloat16, 32, 2, 192, 128, 64, 16, 64, 4, False, False),
    (torch.float16, 10, 2, 65, 18, 48, 32, 96, 5, False, True),
    (torch.float32, 16, 4, 128, 128, 32, 16, 64, 16, True, False),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for case in CHECKS:
        yield from _checks(case, device)


def _checks(case: Check, device: torch.device) -> Iterator[CheckCase]:
    generator = torch.Generator().manual_seed(0)
    query_ends, key_ends = (tuple(itertools.accumulate(lengths)) for lengths in (case.queries, case.keys))
    shapes = (
        (query_ends[-1], case.heads, case.key_dim),
        (key_ends[-1], case.kv_heads, case.key_dim),
        (key_ends[-1], case.kv_heads, case.value_dim),
        (query_ends[-1], case.heads, case.value_dim),
    )
    q, k, v, g = (torch.randn(shape, generator=generator).to(case.dtype).to(device) for shape in shapes)
    causal = case.forced is not None
    atten_mask, topk_mask = (None, None) if causal else _masks(case, device)
    initial, local = case.forced or (0, 0)
    scale, ends, windows = case.key_dim**-0.5, (query_ends, key_ends), case.window
    sizes: Any = (scale, *windows, case.block_size, case.block_count, causal, initial, local, case.importance)
    # The same ids need not come out of another order of summation: what is judged is the score of each place.
    exact = reference.scores(
        q.double(), k.double(), atten_mask, *ends, scale, *windows, case.block_size, causal, case.importance, local
    )
    # The gradient is made from an output and statistics that are given: here, from exact ones.
    out, _, largest, total = reference.forward(q.double(), k.double(), v.double(), atten_mask, topk_mask, *ends, *sizes)
    given: Any = (out.to(case.dtype), largest, total)
    options: dict[str, Any] = {
        "atten_mask": atten_mask,
        "actual_seq_qlen": query_ends,
        "actual_cmp_seq_kvlen": key_ends,
        "causal": causal,
        "impl": "triton",
    }

    def forward() -> tuple[Tensor, ...]:
        found = nsa_compress_attention(
            q,
            k,
            v,
            scale,
            case.heads,
            *windows,
            case.block_size,
            case.block_count,
            topk_mask=topk_mask,
            num_init_blocks=initial,
            num_local_blocks=local,
            importance=case.importance,
            **options,
        )
        return _comparable(found, exact, query_ends)

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        tensors = (convert(q), convert(k), convert(v))
        found = reference.forward(*tensors, atten_mask, topk_mask, *ends, *sizes, precision=tensors[0].dtype)
        return _comparable(found, exact, query_ends)

    def backward() -> tuple[Tensor, ...]:
        arguments: Any = (g, q, k, v, *given, scale, case.heads, *windows)
        return nsa_compress_attention_grad(*arguments, **options)

    def expected_gradients(convert: Convert) -> tuple[Tensor, ...]:
        out, *statistics = given
        tensors = (convert(g), convert(q), convert(k), convert(v), convert(out))
        arguments: Any = (*tensors, *statistics, atten_mask, *ends, scale, *windows, causal)
        return reference.backward(*arguments, precision=tensors[0].dtype)

    shape = (
        f"T={query_ends[-1]}/{key_ends[-1]} N={case.heads}/{case.kv_heads} D={case.key_dim}/{case.value_dim} "
        f"l={windows[0]} d={windows[1]} l'={case.block_size} K={case.block_count} {case.importance}"
    )
    terms, sums = case.key_dim + max(case.keys), case.key_dim + query_ends[-1] * case.heads // case.kv_heads
    outputs = ("output", "scores of the ids", "softmax_max", "softmax_sum")
    yield CheckCase("nsa_compress_attention", shape, case.dtype, outputs, (terms,) * 4, forward, expected)
    gradients = ("query_grad", "key_grad", "value_grad")
    of_gradients = (terms, sums, sums)
    yield CheckCase(
        "nsa_compress_attention_grad", shape, case.dtype, gradients, of_gradients, backward, expected_gradients
    )


def _masks(case: Check, device: torch.device) -> tuple[Tensor, Tensor]:
    """Key i is hidden from the tokens before i, and from every eighth; block 0 and that of the token are forced."""
    strides = case.block_size // case.window[1]
    token = torch.arange(max(case.queries), device=device).unsqueeze(1)
    key = torch.arange(max(case.keys), device=device)
    block = torch.arange(-(-max(case.keys) // strides), device=device)
    return (key > token) | (token % 8 == 7), (block == 0) | (block == token // strides)


def _comparable(
    found: tuple[Tensor, Tensor, Tensor, Tensor], exact: list[Tensor], query_ends: tuple[int, ...]
) -> tuple[Tensor, ...]:
    """The outputs as what is judged of them. The lowest float32, where nothing is seen, would drown all else."""
    out, ids, largest, total = found
    lengths = [end - begin for begin, end in itertools.pairwise((0, *query_ends))]
    owned = torch.split(ids, lengths)
    scores = torch.cat([scores_at(own, known) for own, known in zip(owned, exact, strict=True)])
    return out, scores, largest.masked_fill(total == 0, 0.0), total


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, heads, kv_heads, key_dim, value_dim, length, stride, block, count, causal, masked = arguments
        visible = "causal" if causal else "masked" if masked else "full"
        yield CompileCase(
            "compress_attention",
            f"{str(dtype).removeprefix('torch.')} N={heads}/{kv_heads} D={key_dim}/{value_dim} "
            f"l={length} d={stride} l'={block} K={count} {visible}",
            functools.partial(_plans, arguments),
        )


def _plans(
    arguments: tuple[torch.dtype, int, int, int, int, int, int, int, int, bool, bool], target: Target
) -> list[Launch]:
    from nsa_triton.ops.compress_attention import launch  # imports triton

    return launch.compile_plans(target, *arguments)
