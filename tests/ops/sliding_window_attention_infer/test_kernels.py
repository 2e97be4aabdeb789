"""The kernels of sliding_window_attention_infer on every target that is present, against the reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.sliding_window_attention_infer import reference
from tests.dtypes import DTYPES, shapes_in_dtypes
from tests.fuzzing import fuzzed
from tests.ops.sliding_window_attention_infer.cases import Problem, Sizes, assert_accurate, make

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.sliding_window_attention_infer import launch

# heads, kv heads, head sizes, page, window; cached tokens; query tokens
SHAPES: list[Any] = [
    (Sizes(32, 2, 192, 128, 128, 512), (1100, 300), (1, 1)),
    (Sizes(8, 8, 128, 128, 64, 64), (0, 1, 63, 64, 65), (0, 1, 1, 1, 1)),
    (Sizes(8, 4, 65, 18, 16, 17), (15, 16, 17, 200), (1, 1, 1, 1)),
    (Sizes(28, 2, 45, 19, 48, 65), (47, 48, 49, 130), (1, 4, 2, 3)),
    (Sizes(64, 1, 80, 48, 64, 15), (129, 500), (2, 2)),
    (Sizes(12, 3, 16, 32, 128, 16), (127, 128, 129), (3, 1, 0)),
    (Sizes(3, 1, 3, 2, 16, 1), (40,), (4,)),
    (Sizes(6, 2, 24, 40, 48, 10_000), (7, 145), (1, 2)),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OWN = [BF16, FP16, FP32, FP32, BF16, FP16, BF16, FP16]  # dtype of each
each_shape = shapes_in_dtypes(SHAPES, OWN, SHAPES[2])


def run(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return launch.forward(*problem)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_results_are_as_accurate_as_eager(shape, dtype, device):
    problem = make(*shape, dtype).to(device)
    assert_accurate(run(problem), problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("page", [16, 48, 128])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 64, 65, 512, 10_000])
def test_any_window_on_any_page(window, page, device):
    """Sequences that end before, at and behind the ends of pages and of the window."""
    ends = sorted({end + more for end in (page, window, 3 * page) for more in (-1, 0, 1) if end <= 600})
    problem = make(Sizes(4, 2, 16, 16, page, window), ends, [1] * len(ends), FP32).to(device)
    assert_accurate(run(problem), problem)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES[:4], OWN, strict=False)), ids=str)
def test_rows_behind_the_query_tokens_are_zero(shape, dtype, device):
    problem = make(*shape, dtype, stride=5).to(device)
    output, lse = run(problem)
    assert_accurate((output, lse), problem)
    for first, count in problem.rows.tolist():
        assert not output[first + count : first + 5].any()
        assert (lse[first + count : first + 5] == -torch.inf).all()


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_garbage_that_is_not_needed_changes_nothing(shape, dtype, device):
    """Block table entries of pages that no window touches; NaN in all of the cache that is no one's."""
    usual, garbage = (make(*shape, dtype, garbage=garbage).to(device) for garbage in (False, True))
    found = run(garbage)
    assert not found[0].isnan().any()
    assert all(torch.equal(a, b) for a, b in zip(found, run(usual), strict=True))


@pytest.mark.usefixtures("poisoned")
def test_any_page_id_reads_some_page(device):
    """Page ids that are needed and not in the cache give the nearest page, as the reference says."""
    problem = make(*SHAPES[3], torch.float32)
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    table = torch.where(problem.table % 2 == 0, problem.table, problem.table * 1_000_003 - 7)
    problem = problem._replace(table=table.int()).to(device)
    assert_accurate(run(problem), problem)


def test_lengths_beyond_the_block_table_read_no_other_memory(device):
    problem = make(*SHAPES[2], torch.float32)
    problem = problem._replace(key=problem.key.nan_to_num(0.5), value=problem.value.nan_to_num(0.5))
    problem = problem._replace(lengths=torch.tensor([-5, 10_000, 2**30, 200], dtype=torch.int32)).to(device)
    assert_accurate(run(problem), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [20.0, 200.0])
def test_big_scores(size, dtype, device):
    """Scores of about +-200, and far beyond, where all weight is on one token."""
    problem = make(Sizes(16, 2, 64, 32, 64, 300), (500, 77), (1, 1), dtype, size=size).to(device)
    assert_accurate(run(problem), problem)


@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_equal_big_scores_average(score, device):
    problem = make(Sizes(4, 2, 16, 16, 16, 50), (70,), (1,), torch.float32).to(device)
    problem = problem._replace(
        query=torch.ones_like(problem.query), key=torch.full_like(problem.key, score / 16), scale=1.0
    )
    output, lse = run(problem)
    expected, expected_lse = reference.forward(*problem.doubled())
    # log-sum-exps of +-200 have 16 bits behind the point, and they weigh the splits of the window
    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)
    assert (lse.abs() > 190).all()


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    problems = [make(*shape, dtype).to(device) for shape, dtype in zip(SHAPES, OWN, strict=True)]
    once = [run(problem) for problem in problems]
    threads = torch.get_num_threads()
    try:
        for number in (1, 3, threads):
            torch.set_num_threads(number)
            for problem, expected in zip(problems, once, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(run(problem), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_a_batch_does_not_depend_on_the_others(device):
    """But for the order of summation: one batch alone is cut into more splits."""
    problem = make(Sizes(4, 2, 32, 32, 16, 40), (90, 5, 64), (1, 1, 1), torch.float32).to(device)
    output, lse = run(problem)
    for b in range(3):
        one = slice(b, b + 1)
        alone = problem._replace(query=problem.query[one], table=problem.table[one], lengths=problem.lengths[one])
        torch.testing.assert_close(run(alone), (output[one], lse[one]), rtol=1e-5, atol=1e-5)


# Few kernels: heads, page, window and head sizes are compiled in, and so is the number of splits.
FUZZED = [
    (Sizes(4, 2, 16, 16, 16, 33), torch.float32),
    (Sizes(14, 1, 65, 18, 48, 128), torch.float16),
    (Sizes(2, 2, 48, 32, 64, 7), torch.bfloat16),
]


@st.composite
def any_problem(draw):
    sizes, dtype = draw(st.sampled_from(FUZZED))
    batch = draw(st.integers(1, 4))
    cached = draw(st.lists(st.integers(0, 300), min_size=batch, max_size=batch))
    tokens = [draw(st.integers(0, min(4, length))) for length in cached]
    stride = max(1, *tokens) if draw(st.booleans()) else None
    if not stride and not any(tokens):
        tokens, cached = [1] * batch, [length + 1 for length in cached]
    return (sizes, cached, tokens, dtype, draw(st.integers(0, 999))), {"stride": stride, "garbage": draw(st.booleans())}


@pytest.mark.usefixtures("one_thread")
@fuzzed(200)
@given(call=any_problem())
def test_any_ragged_batch(call, device):
    check_batch(call, device)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@fuzzed(1000)
@given(call=any_problem())
def test_many_more_ragged_batches(call, device):
    check_batch(call, device)


def check_batch(call, device) -> None:
    problem = make(*call[0], **call[1]).to(device)
    output, lse = run(problem)
    expected, expected_lse = reference.forward(*problem.doubled())
    eps = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=max(4 * eps, 2e-6))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
