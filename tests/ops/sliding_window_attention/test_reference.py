"""The specification against a second formula and autograd, and what the operator means, on every implementation."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as given_any
from hypothesis import strategies as st

from nsa_triton.ops._common import implementation
from nsa_triton.ops.sliding_window_attention import (
    nsa_sliding_window_attention,
    nsa_sliding_window_attention_grad,
    reference,
)
from tests.fuzzing import fuzzed
from tests.ops.sliding_window_attention.cases import (
    Problem,
    Sizes,
    clean,
    every_impl,
    gradients_of,
    make,
    naive,
    naive_gradients,
    outputs_of,
    random_grad,
)

SMALL = Sizes(heads=4, kv_heads=2, key_dim=6, value_dim=5)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("window", [1, 2, 16, 33, 1000])
@pytest.mark.parametrize(
    ("queries", "keys"), [([20], [70]), ([0, 1, 9, 0], [0, 1, 95, 40]), ([33, 4], [31, 0]), ([2, 18, 0], [40, 17, 0])]
)
def test_reference_is_the_naive_formula(queries, keys, window):
    problem = make(SMALL, queries, keys, window, torch.float64, behind=3)
    tidy = clean(problem)
    output, lse = reference.forward(*problem)
    close((output, lse), naive(tidy))
    grad = random_grad(problem)
    close(gradients_of(reference.backward, tidy, grad, (output, lse)), naive_gradients(tidy, grad), 1e-11)


@fuzzed(60)
@given_any(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 70)), min_size=1, max_size=4),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    dims=st.sampled_from([(3, 2), (8, 8), (5, 7)]),
    window=st.integers(1, 80),
    behind=st.integers(0, 2),
    seed=st.integers(0, 999),
)
def test_any_problem_is_the_naive_formula(lengths, group, kv_heads, dims, window, behind, seed):
    queries, keys = zip(*lengths, strict=True)
    problem = make(Sizes(group * kv_heads, kv_heads, *dims), queries, keys, window, torch.float64, seed, behind=behind)
    tidy = clean(problem)
    forward = reference.forward(*problem)
    close(forward, naive(tidy))
    grad = random_grad(problem)
    close(gradients_of(reference.backward, tidy, grad, forward), naive_gradients(tidy, grad), 1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_everything_is_float32_but_the_probabilities(dtype):
    problem = make(SMALL, [20, 9], [40, 50], 16, dtype)
    output, lse = reference.forward(*problem)
    expected, expected_lse = naive(problem)
    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=eps, atol=2 * eps)
    close(lse, expected_lse, 2e-6)
    grad = random_grad(problem)
    gradients = gradients_of(reference.backward, problem, grad, naive(problem))
    for one, other in zip(gradients, naive_gradients(problem, grad), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=1e-5)


def numbers(problem) -> dict[str, Any]:
    return {
        "scale_value": problem.scale,
        "head_num": problem.query.shape[1],
        "window_size": problem.window,
        "actual_seq_qlen": problem.query_ends,
        "actual_seq_kvlen": problem.key_ends,
    }


def public(problem: Problem, impl="reference", **changes) -> Any:
    """The same problem as a public call."""
    tensors = {"query": problem.query, "key": problem.key, "value": problem.value}
    return nsa_sliding_window_attention(**tensors | numbers(problem) | {"impl": impl} | changes)


def gradient(problem: Problem, grad, given, impl="reference", **changes) -> Any:
    tensors: dict[str, Any] = {"grad": grad, "query": problem.query, "key": problem.key, "value": problem.value}
    tensors |= dict(zip(("attention_out", "lse"), given, strict=True))
    return nsa_sliding_window_attention_grad(**tensors | numbers(problem) | {"impl": impl} | changes)


@pytest.mark.parametrize("window", [1, 3, 30])
def test_gradcheck(window):
    problem = clean(make(Sizes(2, 1, 3, 2), [0, 1, 4, 3], [5, 4, 20, 2], window, torch.float64, behind=1))
    leaves = [tensor.requires_grad_() for tensor in problem[:3]]

    def call(*tensors):
        return public(problem, **dict(zip(("query", "key", "value"), tensors, strict=True)))[0]

    assert torch.autograd.gradcheck(call, leaves, fast_mode=window != 3)
    grad = random_grad(problem)
    gradients = torch.autograd.grad(public(problem)[0], leaves, grad)
    close(gradients, naive_gradients(problem, grad), 1e-5)  # the log-sum-exp on the way is float32


# --- meaning ---------------------------------------------------------------------------------------------------------


@every_impl
def test_a_window_of_one_key_returns_its_value(impl):
    problem = make(SMALL, [21], [40], 1)
    output, lse = public(problem, impl)
    close(output, problem.value[-21:].repeat_interleave(2, 1), 1e-6)
    close(lse, torch.einsum("thd,thd->th", problem.query, problem.key[-21:].repeat_interleave(2, 1)) * 6**-0.5, 1e-5)


@every_impl
def test_a_window_as_long_as_the_sequence_is_causal_attention(impl):
    problem = make(SMALL, [40], [40], 40)
    q, k, v = (tensor.transpose(0, 1) for tensor in problem[:3])
    attend = torch.nn.functional.scaled_dot_product_attention
    expected = attend(q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0), is_causal=True).transpose(0, 1)
    for window in (40, 41, 2**31 - 1):
        close(public(problem, impl, window_size=window)[0], expected, 1e-5)
    assert not torch.allclose(public(problem, impl, window_size=39)[0], expected, rtol=1e-5, atol=1e-5)


@every_impl
def test_chunks_of_a_prompt_give_what_the_whole_prompt_gives(impl):
    problem = make(SMALL, [90], [90], 17)
    output, lse = public(problem, impl)
    for begin, end in ((0, 30), (30, 31), (31, 90)):
        ends: Any = {"actual_seq_qlen": [end - begin], "actual_seq_kvlen": [end]}
        chunk = public(problem, impl, query=problem.query[begin:end], **ends)
        close(chunk, (output[begin:end], lse[begin:end]), 1e-5)


@every_impl
def test_query_tokens_before_the_first_key_see_nothing(impl):
    problem = make(SMALL, [50], [20], 5)
    output, lse = public(problem, impl)
    assert not output[:30].any()
    assert (lse[:30] == -torch.inf).all()
    assert lse[30:].isfinite().all()
    tail: Any = {"query": problem.query[30:], "actual_seq_qlen": [20]}
    close(public(problem, impl, **tail), (output[30:], lse[30:]), 1e-6)


@every_impl
def test_autograd_follows_the_forward_call(impl):
    problem = make(SMALL, [20, 13, 30], [20, 40, 11], 9)
    leaves = [tensor.requires_grad_() for tensor in problem[:3]]
    grad = random_grad(problem)
    gradients = torch.autograd.grad(public(problem, impl)[0], leaves, grad)
    close(gradients, naive_gradients(problem, grad), 2e-5)


@every_impl
def test_the_gradient_is_made_of_what_is_given(impl):
    """Any strides of the log-sum-exp."""
    problem = make(SMALL, [20, 13], [20, 40], 9)
    grad, (output, lse) = random_grad(problem), outputs_of(problem)
    expected = gradient(problem, grad, (output, lse), impl)
    close(expected, gradients_of(reference.backward, problem, grad, (output, lse)), 2e-5)
    for other in (lse.t().contiguous().t(), lse.repeat_interleave(2, 1)[:, ::2]):
        close(gradient(problem, grad, (output, other), impl), expected, 0.0)
    changed = gradient(problem, grad, (output + 1, lse), impl)
    assert not torch.allclose(changed[0], expected[0])
    close(changed[2], expected[2], 0.0)


@every_impl
def test_no_rows(impl):
    empty = make(SMALL, [0, 0], [20, 5], 9)
    output, lse = public(empty, impl)
    assert (output.shape, lse.shape) == ((0, 4, 5), (0, 4))
    for part, like in zip(gradient(empty, random_grad(empty), (output, lse), impl), empty[:3], strict=True):
        assert part.shape == like.shape
        assert not part.any()
    nothing = make(SMALL, [3, 2], [0, 0], 9)
    output, lse = public(nothing, impl)
    assert not output.any()
    assert (lse == -torch.inf).all()


@every_impl
@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.as_tensor])
def test_lengths_of_every_kind(impl, kind):
    problem = make(SMALL, [20, 13], [20, 40], 9)
    ends: Any = {"actual_seq_qlen": kind([20, 33]), "actual_seq_kvlen": kind([20, 60])}
    close(public(problem, impl, **ends), public(problem, impl), 0.0)


# --- the choice of the implementation --------------------------------------------------------------------------------


def test_auto_takes_the_reference_for_float64_and_says_so_once(caplog):
    implementation._say_once.cache_clear()
    problem = make(SMALL, [5], [20], 7, torch.float64)
    with caplog.at_level(logging.WARNING, logger="nsa_triton"):
        for _ in range(3):
            output, lse = public(problem, impl="auto")
            gradient(problem, random_grad(problem), (output, lse), impl="auto")
    close(output, naive(problem)[0])
    assert lse.dtype == torch.float32
    assert "float64" in caplog.text
    assert len(caplog.records) == 1
