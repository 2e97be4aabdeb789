"""The kernels touch nothing outside their tensors, and need memory that is linear in the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ops.select_attention import reference
from tests.ops.allocations import Allocations
from tests.ops.select_attention.cases import Sizes, gradients_of, make, random_grad, statistics

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.select_attention import launch

# Tails everywhere: heads of a group, columns, blocks, tiles of query tokens, rows behind the last segment.
SHAPES: list[Any] = [
    (Sizes(3, 1, 18, 5, 48, 3), (33, 0), (50, 20)),
    (Sizes(14, 2, 65, 18, 64, 2), (7, 4), (130, 5)),
    (Sizes(20, 4, 16, 32, 16, 5), (1, 17), (9, 100)),
    (Sizes(2, 2, 48, 16, 32, 1), (40, 1), (65, 0)),
]


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize(("dtype", "causal"), [(torch.bfloat16, True), (torch.float32, False)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_stay_inside_their_tensors(shape, dtype, causal, guarded_launches):
    for garbage, behind in ((False, 2), (True, 0)):
        problem = make(shape[0], shape[1], shape[2], dtype, causal=causal, behind=behind, garbage=garbage)
        launch.forward(*problem)
        gradients_of(launch.backward, problem, random_grad(problem), statistics(problem))
    assert len(set(guarded_launches)) > 2


def test_offsets_beyond_two_to_the_31_elements():
    """Keys and values of more than 2^31 elements; tokens that nobody selects take no memory."""
    kv_heads, dim, tokens = 8, 128, (1 << 21) + 80
    problem = make(Sizes(16, kv_heads, dim, dim, 64, 2), (3,), (200,), torch.float16)
    key, value = (torch.empty((tokens, kv_heads, dim), dtype=torch.float16) for _ in range(2))
    assert key.numel() > 1 << 31
    last = tokens // 64
    problem.ids[:] = torch.tensor([last, last - 1])
    begin = (last - 1) * 64
    count = tokens - begin
    for large, small in ((key, problem.key), (value, problem.value)):
        large[begin:] = small[:count]
    near = problem._replace(key=problem.key[:count], value=problem.value[:count], key_ends=(count,))
    near = near._replace(ids=problem.ids - (last - 1))
    far = problem._replace(key=key, value=value, key_ends=(tokens,))
    for actual, expected in zip(launch.forward(*far), reference.forward(*near.doubled()), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


def test_memory_is_linear_in_the_tokens():
    """A matrix of query tokens and blocks is nowhere, let alone one of query tokens and key tokens."""
    tokens, block = 8192, 64
    problem = make(Sizes(2, 1, 16, 16, block, 4), (tokens,), (tokens,), torch.float16, causal=True)
    grad = random_grad(problem)
    with Allocations() as allocations:
        results = launch.forward(*problem)
        gradients_of(launch.backward, problem, grad, results)
    assert problem.query.numel() <= allocations.largest < tokens * (tokens // block)
