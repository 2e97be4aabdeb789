"""The kernels of sliding_window_attention on every target that is present, against the reference in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ops.sliding_window_attention import reference
from tests.dtypes import DTYPES, shapes_in_dtypes
from tests.fuzzing import fuzzed
from tests.ops.sliding_window_attention.cases import (
    Problem,
    Sizes,
    assert_accurate,
    assert_gradients_accurate,
    clean,
    gradients_of,
    make,
    outputs_of,
    random_grad,
    segments,
)

pytest.importorskip("triton", reason="kernels need a Triton: triton-ascend for cpu and npu, triton for cuda")

from nsa_triton.ops.sliding_window_attention import launch

# Small tensors are not worth a second thread. The test of repeats compares what more threads make of each shape.
pytestmark = pytest.mark.usefixtures("one_thread")

# heads, kv heads, head sizes; query tokens and keys of each segment; window
SHAPES: list[Any] = [
    (Sizes(16, 1, 192, 128), (150, 31), (150, 300), 64),
    (Sizes(4, 2, 64, 64), (31, 33, 0, 1, 140), (63, 65, 10, 0, 140), 33),
    (Sizes(4, 1, 32, 48), (63, 0, 1, 65), (63, 0, 1, 65), 512),
    (Sizes(4, 2, 65, 18), (31, 2, 90), (31, 500, 40), 17),
    (Sizes(3, 3, 3, 2), (65, 133), (31, 129), 50),
    (Sizes(64, 1, 16, 48), (70, 3), (300, 65), 65),
    (Sizes(6, 3, 45, 19), (17,), (400,), 100),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OWN = [BF16, FP32, FP16, BF16, FP32, FP16, BF16]  # dtype of each
each_shape = shapes_in_dtypes(SHAPES, OWN, SHAPES[1])
PLAIN = Sizes(4, 2, 16, 16)  # small and quick, where the shape does not matter


def problem_of(shape, dtype, device, **more) -> Any:
    return make(*shape, dtype, **more).to(device)


def forward(problem: Problem) -> Any:
    return launch.forward(*problem)


backward = functools.partial(gradients_of, launch.backward)


def everything(problem) -> tuple[torch.Tensor, ...]:
    """Output, log-sum-exp and gradients, the latter from the former."""
    results = forward(problem)
    return *results, *backward(problem, random_grad(problem), results)


def same(actual, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def check(problem: Problem) -> None:
    assert_accurate(forward(problem), problem)
    given, grad = outputs_of(problem), random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, given), problem, grad, given)


def check_one(problem) -> None:
    """By the size of the numbers: the gradients of queries that see one key are 0."""
    output, lse = forward(problem)
    expected, expected_lse = reference.forward(*problem.doubled())
    eps = torch.finfo(output.dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=4 * eps, atol=max(4 * eps, 2e-6))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    grad, given = random_grad(problem), (output, lse)
    doubled = [part.double() for part in given]
    truths = gradients_of(reference.backward, problem.doubled(), grad.double(), doubled)
    for one, truth in zip(backward(problem, grad, given), truths, strict=True):
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        torch.testing.assert_close(one.double(), truth, rtol=4 * eps, atol=max(4 * eps, 4e-6) * max(scale, 1.0))


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_results_are_as_accurate_as_eager(shape, dtype, device):
    check(problem_of(shape, dtype, device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 150, 512, 2**31 - 1])
def test_windows(window, device):
    """Shorter and longer than tiles and segments, and one off."""
    check_one(make(PLAIN, (150, 5, 40), (150, 90, 20), window).to(device))


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("group", [1, 2, 4, 16, 64])
def test_groups(group, device):
    """Apart from all else; most of them are among SHAPES too."""
    check(make(Sizes(2 * group, 2, 32, 16), (100, 17), (100, 60), 40, BF16).to(device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("queries", "keys"),
    [((1,), (1,)), ((1,), (300,)), ((300,), (1,)), ((200, 3), (40, 300)), ((64, 64), (64, 65)), ((65,), (64,))],
    ids=str,
)
def test_chunks_of_any_length(queries, keys, device):
    """One token, later chunks of a prompt, and more query tokens than keys: whole tiles see nothing."""
    check_one(make(PLAIN, queries, keys, 48).to(device))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("queries", "keys"), [((5, 0), (0, 0)), ((5, 0), (0, 40)), ((0, 0), (20, 5))], ids=str)
def test_segments_without_keys_or_queries(queries, keys, device):
    problem = make(PLAIN, queries, keys, 16, behind=3).to(device)
    problem = problem._replace(key=problem.key[: sum(keys)], value=problem.value[: sum(keys)])
    output, lse, *gradients = everything(problem)
    assert (lse == -torch.inf).all()
    assert not output.any()
    for gradient, tensor in zip(gradients, problem[:3], strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_gradients_are_made_of_what_is_given(shape, dtype, device):
    """Any attention_out and log-sum-exp."""
    problem = problem_of(shape, dtype, device)
    changed = (random_grad(problem, seed=5), outputs_of(problem)[1] + 0.5)
    grad = random_grad(problem)
    assert_gradients_accurate(backward(problem, grad, changed), problem, grad, changed)


@pytest.mark.usefixtures("poisoned")
@each_shape
def test_rows_behind_the_last_segment_are_nobodys(shape, dtype, device):
    """They hold NaN: outputs and gradients are zero there, and nothing else changes."""
    problem = problem_of(shape, dtype, device)
    results = everything(problem)
    longer = problem_of(shape, dtype, device, behind=7)
    assert torch.equal(longer.query[:-7], problem.query)
    outputs = forward(longer)
    bad = torch.full_like(longer.query[..., :1], float("nan")).repeat(1, 1, longer.value.shape[2])
    bad[:-7] = random_grad(problem)
    actual = (*outputs, *backward(longer, bad, outputs))
    assert same([tensor[:-7] for tensor in actual], results)
    output, lse, *gradients = (tensor[-7:] for tensor in actual)
    assert (lse == -torch.inf).all()
    assert not any(tensor.any() for tensor in (output, *gradients))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_outside_of_the_window_do_not_matter(dtype, device):
    """Not a bit, however large they are."""
    problem = make(PLAIN, (20,), (300,), 40, dtype).to(device)
    results = everything(problem)
    changed = problem._replace(key=problem.key.clone(), value=problem.value.clone())
    changed.key[: 300 - 20 - 40 + 1] = 1e4
    changed.value[: 300 - 20 - 40 + 1] = -1e4
    assert same(everything(changed), results)
    assert not results[3][: 300 - 20 - 40 + 1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [8.0, 25.0])
def test_big_scores(size, dtype, device):
    """Scores of about +-20 and +-60."""
    check(make(Sizes(4, 2, 64, 64), (33, 90), (200, 77), 33, dtype, size=size).to(device))


@pytest.mark.parametrize("score", [-200.0, -60.0, 60.0, 200.0])
def test_equal_big_scores_average(score, device):
    problem = make(PLAIN, (20,), (70,), 17).to(device)
    ones, keys = torch.ones_like(problem.query), torch.full_like(problem.key, score / 16)
    problem = problem._replace(query=ones, key=keys, scale=1.0)
    output, lse = forward(problem)
    expected, expected_lse = reference.forward(*problem.doubled())
    torch.testing.assert_close(output.double(), expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(expected_lse[-1], torch.full_like(expected_lse[-1], 17).log() + score)


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
        tensors = (problem.query[of_queries], problem.key[of_keys], problem.value[of_keys])
        alone = Problem(*tensors, (rows,), (tokens,), *problem[5:])
        together = [result[of_queries] for result in results[:3]] + [result[of_keys] for result in results[3:]]
        assert same(forward(alone), together[:2])
        gradients = backward(alone, grad[of_queries], together[:2])
        eps = torch.finfo(dtype).eps  # sums over the query tokens may be made in other parts
        torch.testing.assert_close(gradients, tuple(together[2:]), rtol=2 * eps, atol=1e-5)


def test_strided_inputs_give_the_bits_of_dense_ones(device):
    problem = make(Sizes(4, 2, 32, 16), (40, 9), (90, 33), 30, torch.float16).to(device)
    output, lse, *gradients = everything(problem)
    grad = random_grad(problem)

    def turned(tensor):  # the last dimension stays dense, as the operator sees to it
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    def wide(tensor):
        shape = (2 * tensor.shape[0], tensor.shape[1] + 3, tensor.shape[2] + 5)
        return tensor.new_full(shape, float("nan"))[::2, 2:-1, 3:-2].copy_(tensor)

    for change, of_lse in ((turned, lse.contiguous()), (wide, lse.repeat(2, 2)[: len(lse), : lse.shape[1]])):
        tensors = (change(tensor) for tensor in problem[:3])
        other = Problem(*tensors, *problem[3:])
        actual = (*forward(other), *backward(other, change(grad), (change(output), of_lse)))
        assert same(actual, (output, lse, *gradients))


# Few kernels: heads and head sizes are compiled in. Lengths, windows and data are not.
FUZZED = [(PLAIN, torch.float32), (Sizes(4, 1, 18, 5), torch.float16), (Sizes(2, 2, 48, 32), torch.bfloat16)]


@st.composite
def any_problem(draw):
    sizes, dtype = draw(st.sampled_from(FUZZED))
    lengths = draw(st.lists(st.tuples(st.integers(0, 130), st.integers(0, 200)), min_size=1, max_size=4))
    queries, keys = zip(*((n, n if draw(st.booleans()) else other) for n, other in lengths), strict=True)
    behind = draw(st.integers(0, 2)) if sum(queries) else 1
    window = draw(st.sampled_from([1, 2, 15, 16, 17, 33, 64, 130]) | st.integers(1, 220))
    return make(sizes, queries, keys, window, dtype, draw(st.integers(0, 999)), behind=behind)


@fuzzed(200)
@given(problem=any_problem())
def test_any_ragged_batch(problem, device):
    check_one(clean(problem).to(device))


@pytest.mark.slow
@fuzzed(1200)
@given(problem=any_problem())
def test_many_more_ragged_batches(problem, device):
    check_one(clean(problem).to(device))
