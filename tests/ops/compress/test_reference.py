"""The specification against a second formula, and the acceptance data of CANN and MindSpore on every implementation."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton import npu_nsa_compress, npu_nsa_compress_grad, nsa_compress, nsa_compress_grad
from nsa_triton.ops._common import implementation
from nsa_triton.ops.compress import reference
from tests.fuzzing import fuzzed
from tests.ops.compress.cases import (
    MINDSPORE_CASES,
    assert_cann_close,
    assert_mindspore_close,
    dense,
    dense_grad,
    ends_of,
    every_impl,
    make,
    mindspore_data,
)

WINDOWS = [(16, 16), (32, 16), (48, 32), (64, 48), (128, 16), (128, 128)]
LENGTHS = [[200], [31, 0, 32, 33, 1, 160], [128, 129, 127], [5, 400]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("block", "stride"), WINDOWS)
def test_reference_is_the_dense_formula(lengths, block, stride):
    input, weight, ends = make(lengths, heads=3, head_size=32, block=block, dtype=torch.float64)
    output = reference.forward(input, weight, block, stride, tuple(ends))
    torch.testing.assert_close(output, dense(input, weight, stride, ends), rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(output)
    actual = reference.backward(grad, input, weight, block, stride, tuple(ends))
    torch.testing.assert_close(actual, dense_grad(grad, input, weight, stride, ends), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_are_float32_and_rounded_once(dtype):
    input, weight, ends = make([300], block=128, dtype=dtype)
    output = nsa_compress(input, weight, 128, 16, actual_seq_len=ends, impl="reference")
    exact = dense(input, weight, 16, ends)
    tolerance = torch.finfo(dtype).eps / 2 + 128 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(output.double(), exact, rtol=tolerance, atol=1e-4)
    assert output.dtype == dtype


def test_gradcheck_and_gradgradcheck():
    input, weight, ends = make([33, 0, 20, 48], heads=1, head_size=16, block=32, dtype=torch.float64)
    input.requires_grad_()
    weight.requires_grad_()

    def call(input, weight):
        return nsa_compress(input, weight, 32, 16, actual_seq_len=ends, impl="reference")

    assert torch.autograd.gradcheck(call, (input, weight), fast_mode=True)
    assert torch.autograd.gradcheck(call, (input[:, :, :16], weight))
    assert torch.autograd.gradgradcheck(call, (input, weight), fast_mode=True)


def test_gradient_of_the_gradient_function():
    input, weight, ends = make([33, 48], heads=1, head_size=16, block=32, dtype=torch.float64)
    grad = torch.randn(3, 1, 16, dtype=torch.float64)
    arguments = [tensor.requires_grad_() for tensor in (grad, input, weight)]

    def call(grad, input, weight):
        return nsa_compress_grad(grad, input, weight, 32, 16, actual_seq_len=ends, impl="reference")

    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


@fuzzed(200)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=6),
    heads=st.integers(1, 5),
    head_size=st.sampled_from([16, 48, 80]),
    window=st.sampled_from(WINDOWS),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    turned=st.booleans(),
)
def test_any_legal_call_is_the_dense_formula(lengths, heads, head_size, window, dtype, turned):
    block, stride = window
    input, weight, ends = make(lengths, heads, head_size, block, dtype)
    if turned:
        input, weight = input.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight.t().contiguous().t()
    output = npu_nsa_compress(input, weight, block, stride, actual_seq_len=ends, impl="reference")
    expected = dense(input, weight, stride, ends)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=eps, atol=1e-4 if eps > 1e-10 else 1e-10)
    assert output.shape == expected.shape
    grad = torch.ones_like(output)
    actual = npu_nsa_compress_grad(grad, input, weight, block, stride, actual_seq_len=ends, impl="reference")
    for one, other in zip(actual, dense_grad(grad, input, weight, stride, ends), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=2e-3 if eps > 1e-10 else 1e-9)


# --- acceptance data -------------------------------------------------------------------------------------------------


@every_impl
def test_op_plugin_compress(impl):
    generator = np.random.RandomState(7)
    ends = np.cumsum(generator.randint(0, 100, 48))
    input, weight, _ = make([int(ends[-1])], heads=4, head_size=128, block=16, dtype=torch.float16)
    output = npu_nsa_compress(input, weight, 16, 16, actual_seq_len=ends, impl=impl)
    assert_cann_close(output, dense(input, weight, 16, ends.tolist()))


@every_impl
def test_op_plugin_compress_grad(impl):
    input, weight, _ = make([49], heads=128, head_size=192, block=32, dtype=torch.float16)
    grad = torch.randn(1, 128, 192).half()
    ends = [0, 5, 49]
    actual = npu_nsa_compress_grad(grad, input, weight, 32, 16, actual_seq_len=ends, impl=impl)
    for one, other in zip(actual, dense_grad(grad, input, weight, 16, ends), strict=True):
        assert_cann_close(one, other)


@every_impl
def test_mindspore_documentation_example(impl):
    ends = tuple(np.cumsum([80, 96, 80], dtype=np.int64).tolist())
    input, weight, _ = make([ends[-1]], heads=8, head_size=128, block=64, dtype=torch.float16)
    output = nsa_compress(input, weight, 64, 16, actual_seq_len=ends, impl=impl)
    assert output.shape == (7, 8, 128)
    assert_cann_close(output, dense(input, weight, 16, list(ends)))


@every_impl
@pytest.mark.parametrize("case", MINDSPORE_CASES, ids=lambda case: f"seed{case.seed}")
def test_mindspore_data(case, impl):
    input, weight, ends = mindspore_data(case)
    assert ends[-1] == case.tokens
    golden = dense(input, weight, case.stride, ends)
    golden_grads = dense_grad(torch.ones_like(golden), input, weight, case.stride, ends)
    tensors = (input.requires_grad_(), weight.requires_grad_())
    output = npu_nsa_compress(*tensors, case.block, case.stride, actual_seq_len=ends, impl=impl)
    assert output.shape == (case.rows, case.heads, case.head_size)
    grads = torch.autograd.grad(output, tensors, torch.ones_like(output))
    for actual, expected in zip((output.detach(), *grads), (golden, *golden_grads), strict=True):
        assert_mindspore_close(actual, expected, reduction=case.head_size)


@every_impl
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_bad_token_spoils_only_the_windows_that_cover_it(bad, impl):
    input, weight, ends = make([100, 60], block=32)
    input[40, 1, 3] = bad
    output = nsa_compress(input, weight, 32, 16, actual_seq_len=ends, impl=impl)
    spoiled = torch.zeros_like(output, dtype=torch.bool)
    spoiled[1:3, 1, 3] = True  # the windows that start at tokens 16 and 32
    assert torch.equal(~output.isfinite(), spoiled)
    if bad == float("inf"):
        assert output[1:3, 1, 3].isinf().all()


@every_impl
def test_long_segments_and_many_rows(impl):
    input, weight, ends = make([3000, 16, 1001], heads=1, block=16, dtype=torch.bfloat16)
    output = nsa_compress(input, weight, 16, 16, actual_seq_len=ends, impl=impl)
    assert output.shape[0] == 187 + 1 + 62
    torch.testing.assert_close(output.double(), dense(input, weight, 16, ends), rtol=2**-8, atol=1e-4)


# --- the choice of the implementation --------------------------------------------------------------------------------


def test_auto_takes_the_reference_for_float64_and_says_so_once(caplog):
    implementation._say_once.cache_clear()
    input, weight, ends = make([64], dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="nsa_triton"):
        for _ in range(3):
            output = nsa_compress(input, weight, 32, 16, actual_seq_len=ends)
    torch.testing.assert_close(output, dense(input, weight, 16, ends))
    assert [record.name for record in caplog.records] == ["nsa_triton"]
    assert "float64" in caplog.text


def test_empty_first_segments_are_an_offset_of_zero():
    input, weight, _ = make([96], block=32)
    expected = nsa_compress(input, weight, 32, 16, actual_seq_len=ends_of([40, 56]), impl="reference")
    for ends in ([0, 40, 96], [0, 0, 40, 40, 96, 96]):
        actual = npu_nsa_compress(input, weight, 32, 16, actual_seq_len=ends, impl="reference")
        assert torch.equal(actual, expected)
