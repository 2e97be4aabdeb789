"""The kernels touch nothing outside their tensors, and need memory that is linear in the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ops.sliding_window_attention import reference
from tests.ops.allocations import Allocations
from tests.ops.sliding_window_attention.cases import Sizes, gradients_of, make, outputs_of, random_grad

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops.sliding_window_attention import launch

# Tails everywhere: columns, tiles of query tokens and of keys, windows that are cut, rows behind the last segment.
SHAPES: list[Any] = [
    (Sizes(3, 1, 18, 5), (133, 0), (50, 20), 40),
    (Sizes(14, 2, 65, 18), (7, 4), (130, 5), 17),
    (Sizes(20, 4, 16, 32), (1, 17), (9, 100), 100),
    (Sizes(2, 2, 48, 16), (140, 1), (165, 0), 1),
]


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_stay_inside_their_tensors(shape, dtype, guarded_launches):
    sizes, queries, keys, window = shape
    for behind in (0, 2):
        problem = make(sizes, queries, keys, window, dtype, behind=behind)
        launch.forward(*problem)
        gradients_of(launch.backward, problem, random_grad(problem), outputs_of(problem))
    assert {"attention_fwd", "attention_terms", "attention_dq", "attention_dkv"} <= set(guarded_launches)


def test_offsets_beyond_two_to_the_31_elements():
    """Keys and values of more than 2^31 elements; tokens that nobody sees take no memory."""
    kv_heads, dim, tokens, window = 8, 128, (1 << 21) + 80, 100
    problem = make(Sizes(16, kv_heads, dim, dim), (3,), (200,), window, torch.float16)
    key, value = (torch.empty((tokens, kv_heads, dim), dtype=torch.float16) for _ in range(2))
    assert key.numel() > 1 << 31
    for large, small in ((key, problem.key), (value, problem.value)):
        large[-200:] = small
    far = problem._replace(key=key, value=value, key_ends=(tokens,))
    for actual, expected in zip(launch.forward(*far), reference.forward(*problem.doubled()), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)


def test_memory_is_linear_in_the_tokens():
    """A matrix of query tokens and the keys of their windows is nowhere, let alone one of all keys."""
    tokens, window = 4096, 256
    problem = make(Sizes(2, 1, 16, 16), (tokens,), (tokens,), window, torch.float16)
    grad = random_grad(problem)
    with Allocations() as allocations:
        results = launch.forward(*problem)
        gradients_of(launch.backward, problem, grad, results)
    assert problem.query.numel() <= allocations.largest < tokens * window
