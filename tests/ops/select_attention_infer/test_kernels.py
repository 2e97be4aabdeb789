"""The kernels of select_attention_infer on every target that is present, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

from tests.dtypes import shapes_in_dtypes
from tests.fuzzing import fuzzed
from tests.ops.paged_runs import PagedKernels, assert_as_the_reference, assert_nothing_behind, ragged_batches
from tests.ops.select_attention_infer.cases import OP, Problem, Sizes, assert_accurate, make

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.select_attention_infer import launch

# heads, kv heads, head sizes, page, block, entries; cached tokens; query tokens
SHAPES: list[Any] = [
    (Sizes(32, 2, 192, 128, 128, 64, 16), (1100, 300), (1, 1)),
    (Sizes(8, 8, 128, 128, 64, 32, 4), (0, 1, 63, 64, 65), (0, 1, 1, 1, 1)),
    (Sizes(8, 4, 65, 18, 16, 48, 5), (15, 16, 17, 200), (1, 1, 1, 1)),
    (Sizes(28, 2, 45, 19, 48, 64, 3), (47, 48, 49, 130), (1, 4, 2, 3)),
    (Sizes(64, 1, 80, 48, 64, 128, 2), (129, 500), (2, 2)),
    (Sizes(12, 3, 16, 32, 128, 16, 9), (127, 128, 129), (3, 1, 0)),
    (Sizes(3, 1, 3, 2, 16, 16, 1), (40,), (4,)),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OWN = [BF16, FP16, FP32, FP32, BF16, FP16, BF16]  # dtype of each
each_shape = shapes_in_dtypes(SHAPES, OWN, SHAPES[2])


def run(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.forward(*problem)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_results_are_as_accurate_as_eager(shape, dtype, device):
    problem = make(*shape, dtype).to(device)
    assert_accurate(run(problem), problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES[:4], OWN, strict=False)), ids=str)
def test_rows_behind_the_query_tokens_are_zero(shape, dtype, device):
    problem = make(*shape, dtype, stride=5).to(device)
    found = run(problem)
    assert_accurate(found, problem)
    assert_nothing_behind(found, problem.rows, 5)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_garbage_that_is_not_needed_changes_nothing(shape, dtype, device):
    """Ids that are no block, block table entries of pages that are not read, NaN in cache rows of no one."""
    problem = make(*shape, dtype, garbage=True).to(device)
    output, lse = run(problem)
    assert not output.isnan().any()
    assert_accurate((output, lse), problem)


class TestPagedKernels(PagedKernels):
    op = OP
    run = staticmethod(launch.forward)
    assert_accurate = staticmethod(assert_accurate)
    shapes = SHAPES
    dtypes = OWN
    wide = Sizes(16, 2, 64, 32, 64, 64, 6)
    narrow = Sizes(4, 2, 16, 16, 16, 32, 3)


def test_lengths_beyond_the_block_table_read_no_other_memory(device):
    problem = make(*SHAPES[2], torch.float32)
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    problem = problem._replace(lengths=torch.tensor([-5, 10_000, 2**30, 200], dtype=torch.int32))
    problem = problem._replace(ids=problem.ids % 200).to(device)
    assert_accurate(run(problem), problem)


# Few kernels: heads, page, block, entries and head sizes are compiled in, and so is the number of splits.
FUZZED = [
    (Sizes(4, 2, 16, 16, 16, 32, 3), torch.float32),
    (Sizes(14, 1, 65, 18, 48, 64, 2), torch.float16),
    (Sizes(2, 2, 48, 32, 64, 48, 4), torch.bfloat16),
]


@pytest.mark.usefixtures("one_thread")
@fuzzed(200)
@given(call=ragged_batches(FUZZED))
def test_any_ragged_batch(call, device):
    check_batch(call, device)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@fuzzed(1000)
@given(call=ragged_batches(FUZZED))
def test_many_more_ragged_batches(call, device):
    check_batch(call, device)


def check_batch(call, device) -> None:
    problem = make(*call[0], **call[1]).to(device)
    assert_as_the_reference(run(problem), OP, problem)
