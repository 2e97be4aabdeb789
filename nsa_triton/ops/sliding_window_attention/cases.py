"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.sliding_window_attention import reference
from nsa_triton.ops.sliding_window_attention.api import (
    nsa_sliding_window_attention,
    nsa_sliding_window_attention_grad,
)

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
    window: int
    dtype: torch.dtype


# Ragged on purpose: empty segments, segments of one token, later chunks, more queries than keys.
CHECKS = [
    Check((150, 0, 70), (150, 5, 200), 16, 1, 192, 128, 48, torch.bfloat16),
    Check((133, 1, 17), (133, 1, 17), 4, 1, 64, 64, 65, torch.float16),
    Check((40, 23), (65, 17), 3, 3, 64, 64, 512, torch.bfloat16),
    Check((31, 20), (200, 0), 4, 2, 65, 18, 7, torch.float32),
]
# dtype, heads, kv heads, key and value head size, window
COMPILES = [
    (torch.bfloat16, 64, 4, 192, 128, 512),
    (torch.float16, 32, 8, 128, 128, 1024),
    (torch.bfloat16, 16, 16, 64, 64, 4096),
    (torch.float16, 10, 2, 65, 18, 100),
    (torch.bfloat16, 64, 1, 256, 256, 512),
    (torch.float32, 16, 4, 128, 128, 512),
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
    rest: Any = (*ends, case.key_dim**-0.5, case.window)
    # The gradient is made from an output and a log-sum-exp that are given: here, from exact ones.
    out, lse = reference.forward(q.double(), k.double(), v.double(), *rest)
    given: Any = (out.to(case.dtype), lse.float())
    sizes: Any = (case.key_dim**-0.5, case.heads, case.window)
    more: dict[str, Any] = {"actual_seq_qlen": ends[0], "actual_seq_kvlen": ends[1], "impl": "triton"}

    def run() -> tuple[Tensor, ...]:
        return _judged(*nsa_sliding_window_attention(q, k, v, *sizes, **more))

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        tensors = (convert(q), convert(k), convert(v))
        output, _ = reference.forward(*tensors, *rest, precision=tensors[0].dtype)
        return _judged(output, reference.forward(*tensors, *rest)[1])

    def run_gradient() -> tuple[Tensor, ...]:
        return nsa_sliding_window_attention_grad(g, q, k, v, *given, *sizes, **more)

    def expected_gradients(convert: Convert) -> tuple[Tensor, ...]:
        tensors = (convert(g), convert(q), convert(k), convert(v), convert(given[0]))
        return reference.backward(*tensors, given[1], *rest, precision=tensors[0].dtype)

    shape = (
        f"B={len(case.queries)} T={query_tokens}/{key_tokens} N={case.heads}/{case.kv_heads} "
        f"D={case.key_dim}/{case.value_dim} window={case.window}"
    )
    terms = case.key_dim + min(case.window, max(case.keys))
    outputs = ("attention_out", "lse")
    yield CheckCase("nsa_sliding_window_attention", shape, case.dtype, outputs, (terms,) * 2, run, expected)
    gradients = ("query_grad", "key_grad", "value_grad")
    of_keys = query_tokens * case.heads // case.kv_heads + case.key_dim
    name, counts = "nsa_sliding_window_attention_grad", (terms, of_keys, of_keys)
    yield CheckCase(name, shape, case.dtype, gradients, counts, run_gradient, expected_gradients)


def _judged(output: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """The outputs, with 0 for the log-sum-exp of rows that see nothing: the difference of infinities is none."""
    return output, lse.masked_fill(lse == -torch.inf, 0.0)


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, heads, kv_heads, key_dim, value_dim, window = arguments
        yield CompileCase(
            "sliding_window_attention",
            f"{str(dtype).removeprefix('torch.')} N={heads}/{kv_heads} D={key_dim}/{value_dim} window={window}",
            functools.partial(_plans, arguments),
        )


def _plans(arguments: tuple[torch.dtype, int, int, int, int, int], target: Target) -> list[Launch]:
    from nsa_triton.ops.sliding_window_attention import launch  # imports triton

    return launch.compile_plans(target, *arguments)
