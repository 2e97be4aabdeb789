"""What `nsa-triton check` runs and `nsa-triton compile` compiles for this op: declared once, for every target."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_triton.ops._common.cases import CheckCase, CompileCase, Convert
from nsa_triton.ops.gated_combine import reference
from nsa_triton.ops.gated_combine.api import nsa_gated_combine, nsa_gated_combine_grad

if TYPE_CHECKING:
    from nsa_triton.runtime.launch import Launch
    from nsa_triton.runtime.target import Target

# tokens, heads, head size, dtype of the branches, and of the gates. Tails in rows and columns on purpose.
CHECKS = [
    (519, 64, 128, torch.bfloat16, torch.bfloat16),
    (1024, 16, 64, torch.float16, torch.float32),
    (331, 5, 80, torch.float32, torch.float32),
    (77, 3, 520, torch.bfloat16, torch.float32),
]
COMPILES = [
    (torch.bfloat16, 64, 128, torch.bfloat16),
    (torch.bfloat16, 64, 128, torch.float32),
    (torch.float16, 32, 64, torch.float16),
    (torch.float32, 64, 128, torch.float32),
    (torch.bfloat16, 4, 80, torch.float32),
    (torch.bfloat16, 4, 512, torch.bfloat16),
]


def check_cases(device: torch.device) -> Iterator[CheckCase]:
    for check in CHECKS:
        yield from _checks(*check, device)


def _checks(
    tokens: int, heads: int, value_dim: int, dtype: torch.dtype, gates: torch.dtype, device: torch.device
) -> Iterator[CheckCase]:
    generator = torch.Generator().manual_seed(0)
    size = (tokens, heads, value_dim)
    g, c, s, w = (torch.randn(size, generator=generator).to(dtype).to(device) for _ in range(4))
    z = torch.randn((tokens, heads, 3), generator=generator).to(gates).to(device)

    def forward() -> tuple[Tensor, ...]:
        return (nsa_gated_combine(c, s, w, z, impl="triton"),)

    def backward() -> tuple[Tensor, ...]:
        return nsa_gated_combine_grad(g, c, s, w, z, impl="triton")

    def expected(convert: Convert) -> tuple[Tensor, ...]:
        return (reference.forward(*map(convert, (c, s, w, z))),)

    def expected_gradients(convert: Convert) -> tuple[Tensor, ...]:
        return reference.backward(*map(convert, (g, c, s, w, z)))

    shape = f"T={tokens} N={heads} D={value_dim} gates {str(gates).removeprefix('torch.')}"
    yield CheckCase("nsa_gated_combine", shape, dtype, ("output",), (3,), forward, expected)
    names, terms = ("compressed_grad", "selected_grad", "local_grad", "gates_grad"), (1, 1, 1, value_dim)
    yield CheckCase("nsa_gated_combine_grad", shape, dtype, names, terms, backward, expected_gradients)


def compile_cases() -> Iterator[CompileCase]:
    for arguments in COMPILES:
        dtype, heads, value_dim, gates = arguments
        branches, logits = (str(one).removeprefix("torch.") for one in (dtype, gates))
        yield CompileCase(
            "gated_combine",
            f"{branches} N={heads} D={value_dim} gates {logits}",
            functools.partial(_plans, arguments),
        )


def _plans(arguments: tuple[torch.dtype, int, int, torch.dtype], target: Target) -> list[Launch]:
    from nsa_triton.ops.gated_combine import launch  # imports triton

    return launch.compile_plans(target, *arguments)
