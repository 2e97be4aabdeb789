"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.select_attention import reference
from nsa_triton.ops.select_attention.api import nsa_select_attention, nsa_select_attention_grad

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target


class Check(NamedTuple):
    queries: tuple[int, ...]  # tokens of each segment
    keys: tuple[int, ...]
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    block_count: int
    causal: bool
    dtype: torch.dtype


# Ragged on purpose: empty segments, segments of one token, a last block that is cut, more queries than keys.
CHECKS = [
    Check((20, 0, 13), (130, 65, 33), 16, 1, 192, 128, 64, 4, False, torch.bfloat16),
    Check((33, 1, 17), (33, 1, 17), 4, 1, 64, 64, 32, 3, True, torch.float16),
    Check((40, 23), (65, 17), 3, 3, 64, 64, 16, 4, True, torch.bfloat16),
    Check((31, 20), (200, 0), 4, 2, 65, 18, 96, 5, False, torch.float32),
]
# dtype, heads, kv heads, key and value head size, block, count, causal
COMPILES = [
    (torch.bfloat16, 64, 4, 192, 128, 64, 16, True),
    (torch.float16, 16, 4, 128, 128, 64, 16, False),
    (torch.bfloat16, 4, 4, 64, 64, 16, 8, True),
    (torch.float16, 4, 2, 65, 18, 96, 5, False),
    (torch.bfloat16, 64, 1, 128, 128, 128, 4, True),
    (torch.float32, 8, 2, 128, 64, 64, 8, True),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for case in CHECKS:
        yield from _checks(case, device)


def _checks(case: Check, device: torch.device) -> Iterator[CheckCase]:
    generator = torch.Generator().manual_seed(0)
    ends = tuple(tuple(itertools.accumulate(lengths)) for lengths in (case.queries, case.keys))
    query_tokens, key_tokens = ends[0][-1], ends[1][-1]
    shapes = (
        (query_tokens, case.heads, case.key_dim),
        (key_tokens, case.kv_heads, case.key_dim),
        (key_tokens, case.kv_heads, case.value_dim),
        (query_tokens, case.heads, case.value_dim),
    )
    q, k, v, g = (torch.randn(shape, generator=generator).to(case.dtype).to(device) for shape in shapes)
    ids = _ids(case, generator).to(device)
    scale = case.key_dim**-0.5
    rest: Any = (ids, *ends, scale, case.block_size, case.causal)
    forward = reference.forward(q, k, v, *rest)
    sizes = (scale, case.heads, case.block_size, case.block_count)
    more: dict[str, Any] = {"causal": case.causal, "impl": "triton"}
    more |= dict(zip(("actual_seq_qlen", "actual_seq_kvlen"), ends, strict=True))

    def run() -> tuple[Tensor, ...]:
        return _judged(*nsa_select_attention(q, k, v, ids, *sizes, **more))

    def run_gradient() -> tuple[Tensor, ...]:
        return nsa_select_attention_grad(g, q, k, v, *forward, ids, *sizes, **more)

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        tensors = (convert(q), convert(k), convert(v))
        output, _, _ = reference.forward(*tensors, *rest, precision=tensors[0].dtype)
        return _judged(output, *reference.forward(*tensors, *rest)[1:])

    def expected_gradients(convert: Convert) -> tuple[Tensor, ...]:
        tensors = (convert(g), convert(q), convert(k), convert(v), convert(forward[0]))
        return reference.backward(*tensors, *forward[1:], *rest, precision=tensors[0].dtype)

    shape = (
        f"B={len(case.queries)} T={query_tokens}/{key_tokens} N={case.heads}/{case.kv_heads} "
        f"D={case.key_dim}/{case.value_dim} l'={case.block_size} K={case.block_count}" + " causal" * case.causal
    )
    selected = case.block_count * case.block_size
    terms = case.key_dim + selected
    outputs = ("attention_out", "softmax_max", "softmax_sum")
    yield CheckCase("nsa_select_attention", shape, case.dtype, outputs, (terms,) * 3, run, expected)
    gradients = ("query_grad", "key_grad", "value_grad")
    of_keys = query_tokens * case.heads // case.kv_heads + case.key_dim
    name = "nsa_select_attention_grad"
    counts = (terms, of_keys, of_keys)
    yield CheckCase(name, shape, case.dtype, gradients, counts, run_gradient, expected_gradients)


def _judged(output: Tensor, largest: Tensor, total: Tensor) -> tuple[Tensor, ...]:
    """The outputs, with 0 for the largest score of rows without one: the lowest float32 would hide all errors."""
    return output, largest.masked_fill(total == 0, 0.0), total


def _ids(case: Check, generator: torch.Generator) -> Tensor:
    """Different blocks for each query token and kv head, in any order; -1 where a segment has not enough."""
    ids = torch.full((sum(case.queries), case.kv_heads, case.block_count), -1, dtype=torch.int32)
    lists = iter(ids.flatten(0, 1))
    for queries, keys in zip(case.queries, case.keys, strict=True):
        blocks = -(-keys // case.block_size)
        for _ in range(queries * case.kv_heads):
            chosen = torch.randperm(blocks, generator=generator)[: case.block_count]
            next(lists)[: len(chosen)] = chosen
    return ids


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, heads, kv_heads, key_dim, value_dim, block, count, causal = arguments
        yield CompileCase(
            "select_attention",
            f"{str(dtype).removeprefix('torch.')} N={heads}/{kv_heads} D={key_dim}/{value_dim} l'={block} K={count}"
            + " causal" * causal,
            functools.partial(_plans, arguments),
        )


def _plans(arguments: tuple[torch.dtype, int, int, int, int, int, int, bool], target: Target) -> list[Launch]:
    from nsa_triton.ops.select_attention import launch  # imports triton

    return launch.compile_plans(target, *arguments)
