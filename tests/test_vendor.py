"""The vendors' spellings: signatures of torch_npu, and every documented exception of MindSpore."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import nsa_triton
from nsa_triton import ArgumentTypeError, npu_nsa_compress, npu_nsa_compress_grad, nsa_compress
from nsa_triton.vendor import mindspore

INTEGERS = ["compress_block_size", "compress_stride"]


@pytest.mark.parametrize(
    ("function", "positional"),
    [
        (npu_nsa_compress, ["input", "weight", *INTEGERS]),
        (npu_nsa_compress_grad, ["grad", "input", "weight", *INTEGERS]),
        (mindspore.nsa_compress, ["input", "weight", *INTEGERS]),
    ],
)
def test_signatures(function, positional):
    parameters = inspect.signature(function).parameters
    kinds = {name: parameter.kind for name, parameter in parameters.items()}
    assert [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional
    assert kinds["actual_seq_len"] is inspect.Parameter.KEYWORD_ONLY
    required = function is mindspore.nsa_compress
    assert (parameters["actual_seq_len"].default is inspect.Parameter.empty) == required


def test_own_and_vendor_names_take_the_same_arguments():
    for own, vendor in (
        (nsa_compress, npu_nsa_compress),
        (nsa_triton.nsa_compress_grad, npu_nsa_compress_grad),
    ):
        assert inspect.signature(own) == inspect.signature(vendor)


def test_paged_operators_have_the_positional_arguments_of_torch_npu():
    expected: dict[Any, list[str]] = {
        nsa_triton.npu_nsa_compress_infer: ["input", "weight", "slot_mapping", *INTEGERS, "page_block_size"],
        nsa_triton.npu_nsa_compress_attention_infer: [
            *("query", "key", "value", "scale_value", "head_num", "key_value_head_num", "select_block_size"),
            *("select_block_count", "page_block_size", *INTEGERS),
        ],
        nsa_triton.npu_nsa_select_attention_infer: [
            *("query", "key", "value", "topk_indices", "scale_value", "head_num", "key_value_head_num"),
            *("select_block_size", "select_block_count", "page_block_size"),
        ],
    }
    for function, positional in expected.items():
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional


def test_training_attention_over_compressed_tokens_has_the_arguments_of_torch_npu():
    parameters = inspect.signature(nsa_triton.npu_nsa_compress_attention).parameters.values()
    positional = ["query", "key", "value", "scale_value", "head_num", *INTEGERS, "select_block_size"]
    keywords = ["topk_mask", "atten_mask", "actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"]
    found = [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert found == [*positional, "select_block_count"]
    assert [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY][: len(keywords)] == keywords


def test_npu_lengths_are_required_and_may_begin_with_empty_segments():
    input, weight = torch.randn(49, 2, 16), torch.randn(32, 2)
    with pytest.raises(ArgumentTypeError, match="actual_seq_len"):
        npu_nsa_compress(input, weight, 32, 16)
    for ends in ([0, 5, 49], [0, 0, 5, 5, 49, 49], np.array([0, 5, 49])):
        output = npu_nsa_compress(input, weight, 32, 16, actual_seq_len=ends, impl="reference")
        assert output.shape == (1, 2, 16)
        grads = npu_nsa_compress_grad(output, input, weight, 32, 16, actual_seq_len=ends, impl="reference")
        assert [grad.shape for grad in grads] == [input.shape, weight.shape]
    empty = npu_nsa_compress(input[:0], weight, 32, 16, actual_seq_len=[0, 0])
    assert empty.shape == (0, 2, 16)


# --- mindspore -------------------------------------------------------------------------------------------------------

T, N, D, BLOCK, STRIDE = 256, 2, 32, 32, 16


def call(**changes):
    legal: dict[str, Any] = {
        "input": torch.randn(T, N, D).half(),
        "weight": torch.randn(BLOCK, N).half(),
        "compress_block_size": BLOCK,
        "compress_stride": STRIDE,
        "actual_seq_len": (80, 176, T),
    }
    return mindspore.nsa_compress(**legal | changes)


def half(*shape):
    return torch.zeros(shape, dtype=torch.float16)


def test_legal_calls():
    assert call().shape == (4 + 5 + 4, N, D)
    assert torch.equal(call(actual_seq_len=[T], weight=half(BLOCK, N)), half(15, N, D))
    assert call(input=torch.zeros(T, N, D).bfloat16(), weight=torch.zeros(BLOCK, N).bfloat16()).dtype == torch.bfloat16
    assert call(actual_seq_len=(80, 80, T, T)).shape == (4 + 10, N, D)
    assert call(input=half(20, N, D), actual_seq_len=(20,)).shape == (0, N, D)
    for size in (16, 256):
        assert call(input=half(T, N, size)).shape[2] == size
    for heads in (1, 128):
        assert call(input=half(T, heads, D), weight=half(BLOCK, heads)).shape[1] == heads
    for block in (16, 128):
        windows = {"weight": half(block, N), "compress_block_size": block, "actual_seq_len": (T,)}
        assert call(**windows).shape[0] == (T - block) // 16 + 1
        assert call(**windows, compress_stride=block).shape[0] == T // block


TYPE_ERRORS = {
    "input is no tensor": {"input": np.zeros((T, N, D), np.float16)},
    "input is None": {"input": None},
    "weight is no tensor": {"weight": [[1.0]]},
    "dtypes differ": {"weight": torch.zeros(BLOCK, N)},
    "dtypes differ, both legal": {"weight": torch.zeros(BLOCK, N).bfloat16()},
    "float32": {"input": torch.zeros(T, N, D), "weight": torch.zeros(BLOCK, N)},
    "float64": {"input": torch.zeros(T, N, D).double(), "weight": torch.zeros(BLOCK, N).double()},
    "int32": {"input": torch.zeros(T, N, D).int(), "weight": torch.zeros(BLOCK, N).int()},
    "block is a float": {"compress_block_size": 32.0},
    "block is a bool": {"compress_block_size": True},
    "block is None": {"compress_block_size": None},
    "stride is a float": {"compress_stride": 16.0},
    "stride is a string": {"compress_stride": "16"},
    "stride is a bool": {"compress_stride": True},
    "lengths are None": {"actual_seq_len": None},
    "lengths are an int": {"actual_seq_len": T},
    "lengths are an array": {"actual_seq_len": np.array([T])},
    "lengths are a tensor": {"actual_seq_len": torch.tensor([T])},
    "lengths are floats": {"actual_seq_len": (80.0, 256.0)},
    "lengths are numpy ints": {"actual_seq_len": [np.int64(T)]},
    "lengths hold a bool": {"actual_seq_len": [True, T]},
}


@pytest.mark.parametrize("changes", TYPE_ERRORS.values(), ids=TYPE_ERRORS.keys())
def test_documented_type_errors(changes):
    with pytest.raises(TypeError) as caught:
        call(**changes)
    assert not isinstance(caught.value, (RuntimeError, ValueError))


RUNTIME_ERRORS = {
    "input rank 2": {"input": half(T, D)},
    "input rank 4": {"input": half(1, T, N, D)},
    "weight rank 1": {"weight": half(BLOCK)},
    "weight rank 3": {"weight": half(BLOCK, N, 1)},
    "weight rows": {"weight": half(BLOCK + 16, N)},
    "weight heads": {"weight": half(BLOCK, N + 1)},
    "D 18": {"input": half(T, N, 18)},
    "D 272": {"input": half(T, N, 272)},
    "D 0": {"input": half(T, N, 0)},
    "N 0": {"input": half(T, 0, D), "weight": half(BLOCK, 0)},
    "N 129": {"input": half(T, 129, D), "weight": half(BLOCK, 129)},
    "l 18, d 10": {"weight": half(18, N), "compress_block_size": 18, "compress_stride": 10},
    "l 0": {"weight": half(0, N), "compress_block_size": 0},
    "l 8": {"weight": half(8, N), "compress_block_size": 8},
    "l 144": {"weight": half(144, N), "compress_block_size": 144},
    "l -16": {"compress_block_size": -16},
    "d 10": {"compress_stride": 10},
    "d 0": {"compress_stride": 0},
    "d -16": {"compress_stride": -16},
    "d > l": {"compress_stride": 48},
    "no lengths": {"actual_seq_len": ()},
    "decreasing": {"actual_seq_len": (176, 80, T)},
    "decreasing at the end": {"actual_seq_len": (T, T - 1)},
    "leading zero": {"actual_seq_len": (0, T)},
    "negative": {"actual_seq_len": (-80, T)},
    "last below T": {"actual_seq_len": (80, T - 1)},
    "last above T": {"actual_seq_len": (80, T + 1)},
    "empty input": {"input": half(0, N, D), "actual_seq_len": (0,)},
    "empty input, lengths given": {"input": half(0, N, D)},
    "empty weight": {"weight": half(0, 0)},
}


@pytest.mark.parametrize("changes", RUNTIME_ERRORS.values(), ids=RUNTIME_ERRORS.keys())
def test_documented_runtime_errors(changes):
    with pytest.raises(RuntimeError) as caught:
        call(**changes)
    assert not isinstance(caught.value, TypeError)


def test_lengths_are_required():
    with pytest.raises(TypeError, match="actual_seq_len"):
        mindspore.nsa_compress(half(T, N, D), half(BLOCK, N), BLOCK, STRIDE)  # type: ignore[call-arg]


@pytest.mark.parametrize("wrong_type", TYPE_ERRORS.values(), ids=TYPE_ERRORS.keys())
def test_types_come_first(wrong_type):
    """A call that is wrong in its types and in its values raises the TypeError."""
    for wrong_value in ({"actual_seq_len": ()}, {"compress_stride": 10}, {"actual_seq_len": (0, 9)}):
        if not set(wrong_type) & set(wrong_value):
            with pytest.raises(TypeError):
                call(**wrong_type, **wrong_value)


def test_differentiable_with_no_windows():
    input, weight = half(20, N, D).requires_grad_(), half(BLOCK, N).requires_grad_()
    mindspore.nsa_compress(input, weight, BLOCK, STRIDE, actual_seq_len=[20]).sum().backward()
    assert not input.grad.any()
    assert not weight.grad.any()
