"""The kernels touch nothing outside their tensors, whatever the indices hold and however large the caches are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsa_triton.ascend.toolchain import front_end_problem
from nsa_triton.ops.select_attention_infer import reference
from nsa_triton.runtime.target import target_of
from tests.ops.launches import assert_guarded
from tests.ops.select_attention_infer.cases import Sizes, make

if front_end_problem() is not None:
    pytest.skip(f"no Ascend front end: {front_end_problem()}", allow_module_level=True)

from nsa_triton.ops._common.paged_launch import call_on
from nsa_triton.ops.select_attention_infer import launch

TARGET = target_of(torch.device("cpu"))
# Tails everywhere: heads of a group, columns, blocks, pages. One and several splits; packed and ragged rows.
SHAPES: list[Any] = [
    (Sizes(3, 1, 18, 5, 16, 48, 3), (33,), (1,)),
    (Sizes(14, 2, 65, 18, 48, 64, 2), (47, 130), (1, 1)),
    (Sizes(40, 8, 16, 32, 32, 16, 5), (64, 9), (2, 1)),
    (Sizes(8, 8, 48, 16, 64, 32, 1), (100, 0, 65), (4, 0, 3)),
]


def plans(problem):
    """The launches of a call."""
    call = call_on(*problem[:3], *problem[4:8])
    return launch.plan_launches(TARGET, call, problem.ids, problem.block)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_stay_inside_their_tensors(shape, dtype, side):
    assert_guarded(plans(make(shape[0], shape[1], shape[2], dtype, garbage=True)), TARGET, side)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("length", [-(2**31), -1, 1000, 2**30, 2**31 - 1])
def test_garbage_in_every_index_leads_nowhere_else(length, side):
    """Page ids that are needed and lie outside of the cache, ids and lengths beyond the block table."""
    for sizes, cached, tokens in SHAPES:
        problem = make(sizes, cached, tokens, garbage=True)
        table = torch.tensor([-(2**31), 2**31 - 1, -1, problem.key.shape[0]], dtype=torch.int32)
        table = table[torch.arange(problem.table.numel()) % 4].view(problem.table.shape)
        lengths = torch.full_like(problem.lengths, length)
        assert_guarded(plans(problem._replace(table=table, lengths=lengths)), TARGET, side, harmless=plans(problem))


@pytest.mark.parametrize("side", ["after", "before"])
def test_the_last_block_of_the_longest_sequence_leads_nowhere_else(side):
    """Of 2^31 - 1 tokens, the last block may touch a cut that would begin at token 2^31."""
    problem = make(Sizes(4, 1, 16, 16, 128, 48, 1), (128,), (1,))
    n_pages, length = problem.key.shape[0], 2**31 - 1
    last = problem._replace(
        lengths=torch.full_like(problem.lengths, length),
        ids=torch.full_like(problem.ids, (length - 1) // 48),
        table=torch.full_like(problem.table, n_pages - 1),
    )
    assert_guarded(plans(last), TARGET, side, harmless=plans(problem))


ROWS = [[[-3, 2], [9, 4]], [[0, 2**31 - 1], [1, 1]], [[2**31 - 1, 1], [-(2**31), 5]], [[2, -4], [1, 2**30]]]


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_garbage_in_the_rows_leads_nowhere_else(rows, side):
    """Query lengths on the device are not read back, so that they may add up to anything."""
    problem = make(SHAPES[2][0], (64, 9), (2, 1), torch.float32)
    wild = problem._replace(rows=torch.tensor(rows, dtype=torch.int32))
    assert_guarded(plans(wild), TARGET, side, harmless=plans(problem))


def test_offsets_beyond_two_to_the_31_elements():
    """A cache of more than 2^31 elements; pages never touched take no memory."""
    kv_heads, dim, page = 8, 128, 128
    n_pages = (1 << 31) // (kv_heads * dim * page) + 8
    problem = make(Sizes(16, kv_heads, dim, dim, page, 64, 2), (200,), (1,), torch.float16)
    key, value = (torch.empty((n_pages, page, kv_heads, dim), dtype=torch.float16) for _ in range(2))
    assert key.numel() > 1 << 31
    far = torch.tensor([[n_pages - 1, n_pages - 3]], dtype=torch.int32)
    small = problem.table[:, :2].long()
    for cache, like in ((key, problem.key), (value, problem.value)):
        cache[far[0].long()] = like[small[0]]
    ids = torch.tensor([[[1, 3]]], dtype=torch.int32).expand(1, kv_heads, 2).contiguous()
    expected = reference.forward(*problem._replace(ids=ids).doubled())[0]
    actual = launch.forward(*problem._replace(key=key, value=value, table=far, ids=ids))[0]
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-3)
