"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.compress import reference
from nsa_triton.ops.compress.api import nsa_compress, nsa_compress_grad

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target

# tokens per segment, heads, head size, window, stride, dtype. Ragged on purpose: empty, too short, and with a tail.
CHECKS = [
    ((700, 0, 1349), 4, 192, 32, 16, torch.bfloat16),
    ((2048,), 4, 128, 32, 16, torch.float16),
    ((31, 96, 33, 1, 864), 2, 64, 48, 32, torch.bfloat16),
    ((511, 513), 3, 80, 128, 16, torch.float32),
]
COMPILES = [
    (torch.bfloat16, 4, 192, 32, 16),
    (torch.float16, 4, 128, 32, 16),
    (torch.bfloat16, 8, 64, 16, 16),
    (torch.bfloat16, 4, 128, 64, 32),
    (torch.bfloat16, 2, 64, 48, 32),
    (torch.float16, 128, 256, 128, 16),
    (torch.float32, 4, 128, 32, 16),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for check in CHECKS:
        yield from _checks(*check, device)


def _checks(
    lengths: tuple[int, ...],
    heads: int,
    head_dim: int,
    block: int,
    stride: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[CheckCase]:
    ends = tuple(itertools.accumulate(lengths))
    rows = sum(max(0, (length - block) // stride + 1) for length in lengths)
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, heads, head_dim), (ends[-1], heads, head_dim), (block, heads)
    g, x, w = (torch.randn(shape, generator=generator).to(dtype).to(device) for shape in shapes)

    def forward() -> tuple[Tensor, ...]:
        return (nsa_compress(x, w, block, stride, actual_seq_len=ends, impl="triton"),)

    def backward() -> tuple[Tensor, ...]:
        return nsa_compress_grad(g, x, w, block, stride, actual_seq_len=ends, impl="triton")

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        return (reference.forward(convert(x), convert(w), block, stride, ends),)

    def expected_gradients(convert: Convert) -> tuple[Tensor, ...]:
        return reference.backward(convert(g), convert(x), convert(w), block, stride, ends)

    shape = f"T={ends[-1]} N={heads} D={head_dim} l={block} d={stride}"
    terms = (-(-block // stride), rows * head_dim)
    yield CheckCase("nsa_compress", shape, dtype, ("output",), (block,), forward, expected)
    gradients = ("input_grad", "weight_grad")
    yield CheckCase("nsa_compress_grad", shape, dtype, gradients, terms, backward, expected_gradients)


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, heads, head_dim, block, stride = arguments
        yield CompileCase(
            "compress",
            f"{str(dtype).removeprefix('torch.')} N={heads} D={head_dim} l={block} d={stride}",
            functools.partial(_plans, arguments),
        )


def _plans(arguments: tuple[torch.dtype, int, int, int, int], target: Target) -> list[Launch]:
    from nsa_triton.ops.compress import launch  # imports triton

    return launch.compile_plans(target, *arguments)
