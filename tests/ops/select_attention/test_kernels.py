"""The kernels of select_attention on every target that is present, against the reference in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.select_attention import reference
from tests.dtypes import DTYPES, shapes_in_dtypes
from tests.fuzzing import fuzzed
from tests.ops.select_attention.cases import (
    Problem,
    Sizes,
    assert_accurate,
    assert_gradients_accurate,
    clean,
    gradients_of,
    last_bit,
    make,
    random_grad,
    segments,
    statistics,
)

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.select_attention import launch

# Small tensors are not worth a second thread. The test of repeats compares what more threads make of each shape.
pytestmark = pytest.mark.usefixtures("one_thread")

# heads, kv heads, head sizes, block, entries; query tokens and key tokens of each segment; causal
SHAPES: list[Any] = [
    (Sizes(16, 1, 192, 128, 64, 16), (9, 4), (1100, 300), False),
    (Sizes(4, 2, 64, 64, 64, 4), (31, 33, 0, 1), (63, 65, 10, 0), False),
    (Sizes(4, 1, 32, 48, 16, 8), (63, 0, 1, 65), (63, 0, 1, 65), True),
    (Sizes(4, 2, 65, 18, 96, 5), (31, 2), (31, 500), False),
    (Sizes(3, 3, 3, 2, 16, 8), (65, 33), (31, 129), True),
    (Sizes(64, 1, 64, 48, 128, 3), (5, 3), (300, 65), True),
    (Sizes(6, 3, 45, 19, 16, 1), (17,), (40,), True),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OWN = [BF16, FP32, FP16, BF16, FP32, FP16, BF16]  # dtype of each
each_shape = shapes_in_dtypes(SHAPES, OWN, SHAPES[1])
# Small and quick, where the shape does not matter: what the shapes above and FUZZED compile too.
PLAIN, LARGER = Sizes(4, 2, 16, 16, 32, 3), SHAPES[1][0]
both = pytest.mark.parametrize("causal", [False, True])


def problem_of(shape, dtype, device, **more) -> Any:
    sizes, queries, keys, causal = shape
    return make(sizes, queries, keys, dtype, **{"causal": causal} | more).to(device)


def forward(problem: Problem) -> Any:
    return launch.forward(*problem)


backward = functools.partial(gradients_of, launch.backward)


def everything(problem) -> tuple[torch.Tensor, ...]:
    """Output, statistics and gradients, the latter from the former."""
    results = forward(problem)
    return *results, *backward(problem, random_grad(problem), results)


def same(actual, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_forward_is_as_accurate_as_eager(shape, dtype, device):
    problem = problem_of(shape, dtype, device)
    assert_accurate(forward(problem), problem)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_gradients_are_as_accurate_as_eager(shape, dtype, device):
    problem = problem_of(shape, dtype, device)
    given, grad = statistics(problem), random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, given), problem, grad, given)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_gradients_are_made_of_what_is_given(shape, dtype, device):
    """Any attention_out and statistics, as CANN's own test passes them."""
    problem = problem_of(shape, dtype, device)
    _, largest, total = statistics(problem)
    found = total > 0
    changed = (
        random_grad(problem, seed=5),
        torch.where(found, largest + 0.5, largest),
        torch.where(found, total * 1.5 + 1, total),
    )
    grad = random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, changed), problem, grad, changed)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_rows_behind_the_last_segment_are_nobodys(shape, dtype, device):
    """They hold NaN, and their ids anything: outputs and gradients are zero there, and nothing else changes."""
    problem = problem_of(shape, dtype, device)
    results = everything(problem)
    longer = problem_of(shape, dtype, device, behind=7)
    longer = longer._replace(ids=torch.cat((problem.ids, longer.ids[-7:])))
    for count, dirty in ((len(problem.query), problem.query), (len(problem.key), problem.key)):
        assert torch.equal((longer.query if dirty is problem.query else longer.key)[:count], dirty)
    out, largest, total = forward(longer)
    bad = random_grad(longer)
    bad[: len(problem.query)] = random_grad(problem)
    bad[len(problem.query) :] = float("nan")
    gradients = backward(longer, bad, (out, largest, total))
    sizes = [len(tensor) for tensor in results]
    actual = (out, largest, total, *gradients)
    assert same([tensor[:size] for tensor, size in zip(actual, sizes, strict=True)], results)
    rest = [tensor[size:] for tensor, size in zip(actual, sizes, strict=True)]
    assert (rest.pop(1) == torch.finfo(torch.float32).min).all()
    assert not any(tensor.any() for tensor in rest)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_any_int32_is_an_id(shape, dtype, device):
    problem = problem_of(shape, dtype, device, garbage=True)
    assert_accurate(forward(problem), problem)
    given, grad = statistics(problem), random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, given), problem, grad, given)


@pytest.mark.usefixtures("poisoned")
@both
@pytest.mark.parametrize("ids", [[-1, -1, -1], [2**31 - 1, -(2**31), 5], [16777217, 16777216, 2**24 + 5]], ids=str)
def test_lists_in_which_everything_is_skipped(ids, causal, device):
    problem = make(PLAIN, (20, 3), (50, 70), causal=causal).to(device)
    problem.ids[:] = torch.tensor(ids, dtype=torch.int32)
    out, largest, total, *gradients = everything(problem)
    assert (largest == torch.finfo(torch.float32).min).all()
    assert not any(tensor.any() for tensor in (out, total, *gradients))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("dtype", "causal"), [(BF16, False), (FP32, True)], ids=str)
def test_one_block_chosen_by_every_token(dtype, causal, device):
    problem = make(LARGER, (300, 65), (300, 65), dtype, causal=causal).to(device)
    problem.ids[:] = torch.tensor([0, -1, 0, 0], dtype=torch.int32)
    assert_accurate(forward(problem), problem)
    given, grad = statistics(problem), random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, given), problem, grad, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8.0, 60.0, 200.0])
def test_big_scores(size, dtype, device):
    """Scores of about +-20, +-150 and far beyond, where all weight is on one token."""
    problem = make(LARGER, (33, 9), (200, 77), dtype, size=size).to(device)
    assert_accurate(forward(problem), problem)
    given, grad = statistics(problem), random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, given), problem, grad, given)


@pytest.mark.parametrize("score", [-200.0, -60.0, 60.0, 200.0])
def test_equal_big_scores_average(score, device):
    problem = make(PLAIN, (20,), (70,)).to(device)
    ones, keys = torch.ones_like(problem.query), torch.full_like(problem.key, score / 16)
    problem = problem._replace(query=ones, key=keys, scale=1.0)
    out, largest, total = forward(problem)
    expected, expected_largest, expected_total = reference.forward(*problem.doubled())
    bit = last_bit(expected_largest)  # ids that are there twice
    torch.testing.assert_close(out.double(), expected, rtol=2e-6 + bit, atol=2e-6 + bit)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-6 + bit, atol=0)
    torch.testing.assert_close(largest.double(), expected_largest, rtol=1e-6, atol=0)


def test_results_are_bit_identical_on_repeat_and_with_any_number_of_threads(device):
    problems = [problem_of(shape, dtype, device) for shape, dtype in zip(SHAPES, OWN, strict=True)]
    once = [everything(problem) for problem in problems]
    threads = torch.get_num_threads()
    try:
        for repeat in range(20):
            torch.set_num_threads(repeat % 3 + 1)
            assert all(same(everything(problem), first) for problem, first in zip(problems, once, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("shape", "dtype"), list(zip(SHAPES[:5], OWN, strict=False)), ids=str)
def test_a_batch_gives_what_its_segments_give_alone(shape, dtype, device):
    problem = problem_of(shape, dtype, device)
    results = everything(problem)
    grad = random_grad(problem)
    for of_queries, of_keys in segments(problem):
        rows, tokens = of_queries.stop - of_queries.start, of_keys.stop - of_keys.start
        if rows == 0 or tokens == 0:  # the operator refuses keys without a token
            continue
        tensors = (problem.query[of_queries], problem.key[of_keys], problem.value[of_keys], problem.ids[of_queries])
        alone = Problem(*tensors, (rows,), (tokens,), *problem[6:])
        together = [result[of_queries] for result in results[:4]] + [result[of_keys] for result in results[4:]]
        assert same(forward(alone), together[:3])
        gradients = backward(alone, grad[of_queries], together[:3])
        eps = torch.finfo(dtype).eps  # sums over the query tokens may be made in other parts
        torch.testing.assert_close(gradients, tuple(together[3:]), rtol=2 * eps, atol=1e-5)


def test_strided_inputs_give_the_bits_of_dense_ones(device):
    problem = make(Sizes(4, 2, 32, 16, 32, 3), (40, 9), (90, 33), torch.float16, causal=True).to(device)
    results = everything(problem)
    grad = random_grad(problem)

    def turned(tensor):  # the last dimension stays dense, as the operator sees to it
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def wide(tensor):
        shape = (2 * tensor.shape[0], tensor.shape[1] + 3, tensor.shape[2] + 5)
        return tensor.new_full(shape, float("nan"))[::2, 2:-1, 3:-2].copy_(tensor)

    for change in (turned, wide):
        tensors = (change(tensor) for tensor in problem[:3])
        other = Problem(*tensors, *problem[3:])
        given = [change(tensor) for tensor in results[:3]]
        actual = (*forward(other), *backward(other, change(grad), given))
        assert same(actual, results)


# Few kernels: heads, block, entries, head sizes and causality are compiled in.
FUZZED = [
    (PLAIN, torch.float32, False),
    (Sizes(4, 1, 18, 5, 16, 4), torch.float16, True),
    (Sizes(2, 2, 48, 32, 48, 2), torch.bfloat16, True),
]


@st.composite
def any_problem(draw):
    sizes, dtype, causal = draw(st.sampled_from(FUZZED))
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 150)), min_size=1, max_size=4))
    queries, keys = zip(*lengths, strict=True)
    behind = draw(st.integers(0, 2)) if sum(queries) and sum(keys) else 1
    return (sizes, queries, keys, dtype, draw(st.integers(0, 999))), {
        "causal": causal,
        "behind": behind,
        "garbage": draw(st.booleans()),
    }


@fuzzed(200)
@given(call=any_problem())
def test_any_ragged_batch(call, device):
    check_batch(call, device)


@pytest.mark.slow
@fuzzed(1200)
@given(call=any_problem())
def test_many_more_ragged_batches(call, device):
    check_batch(call, device)


def check_batch(call, device) -> None:
    problem = clean(make(*call[0], **call[1])).to(device)
    output, largest, total = forward(problem)
    expected, expected_largest, expected_total = reference.forward(*problem.doubled())
    eps = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=max(4 * eps, 2e-6))
    torch.testing.assert_close(largest.double(), expected_largest, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-5, atol=0)
    grad, given = random_grad(problem), (output, largest, total)
    gradients = backward(problem, grad, given)
    doubled = [part.double() for part in given]
    truths = gradients_of(reference.backward, problem.doubled(), grad.double(), doubled)
    for one, truth in zip(gradients, truths, strict=True):
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(one.double(), truth, rtol=4 * eps, atol=max(4 * eps, 4e-6) * max(scale, 1.0))
