"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.compress_infer import reference
from nsa_triton.ops.compress_infer.api import nsa_compress_infer

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target

# tokens per batch, heads, head size, window, stride, page (None: packed tokens), new tokens, dtype
CHECKS = [
    ((160, 0, 145, 4096), 4, 192, 32, 16, 64, 1, torch.bfloat16),
    ((2048, 31, 1040), 2, 128, 64, 16, 128, 40, torch.float16),
    ((96, 500, 48), 3, 100, 48, 48, 16, 3, torch.float32),
    ((700, 33, 416), 8, 128, 32, 16, None, 1, torch.bfloat16),
]
# dtype, heads, head size, window, stride, page
COMPILES = [
    (torch.bfloat16, 4, 192, 32, 16, 64),
    (torch.float16, 4, 128, 32, 16, 128),
    (torch.bfloat16, 1, 128, 64, 64, 64),
    (torch.bfloat16, 2, 100, 48, 32, 16),
    (torch.float16, 64, 512, 128, 128, 128),
    (torch.float32, 4, 128, 32, 16, 64),
    (torch.bfloat16, 4, 128, 32, 16, None),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for check in CHECKS:
        yield _check(*check, device)


def _check(
    lengths: tuple[int, ...],
    heads: int,
    size: int,
    block: int,
    stride: int,
    page: int | None,
    new_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> CheckCase:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    batch, windows, table = len(lengths), -(-new_tokens // stride), None
    shape: tuple[int, ...] = (sum(lengths),)
    if page is not None:
        columns = -(-max(lengths) // page)
        shape = (batch * columns, page)
        table = torch.randperm(batch * columns, generator=generator).int().view(batch, columns).to(device)
    x, w, y = randn(*shape, heads, size), randn(block, heads), randn(batch * windows, heads, size)
    slots = torch.randperm(batch * windows, generator=generator).int().view(batch, windows).to(device)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)

    def kernels() -> tuple[Tensor, ...]:
        call = functools.partial(nsa_compress_infer, x, w, slots, block, stride, page or 16, impl="triton")
        return (call(block_table=table, actual_seq_len=lengths, cache=y.clone(), new_tokens=new_tokens),)

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        cache = convert(y).clone()
        reference.forward(convert(x), convert(w), slots, table, counts, cache, block, stride, new_tokens)
        return (cache,)

    text = f"B={batch} N={heads} D={size} l={block} d={stride} page={page or '-'} new={new_tokens}"
    return CheckCase("nsa_compress_infer", text, dtype, ("cache",), (block,), kernels, expected)


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, heads, size, block, stride, page = arguments
        yield CompileCase(
            "compress_infer",
            f"{str(dtype).removeprefix('torch.')} N={heads} D={size} l={block} d={stride} page={page or '-'}",
            functools.partial(_plans, arguments),
        )


def _plans(arguments: tuple[torch.dtype, int, int, int, int, int | None], target: Target) -> list[Launch]:
    from nsa_triton.ops.compress_infer import launch  # imports triton

    return launch.compile_plans(target, *arguments)
