"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nsa_triton import (
    ArgumentTypeError,
    ArgumentValueError,
    NsaError,
    npu_nsa_compress,
    npu_nsa_compress_grad,
    nsa_compress,
    nsa_compress_grad,
)

TOKENS, HEADS, HEAD_SIZE, BLOCK, STRIDE = 96, 2, 32, 32, 16


def arguments(**changes):
    """A legal call of nsa_compress on the reference implementation, with some arguments changed."""
    legal = {
        "input": torch.randn(TOKENS, HEADS, HEAD_SIZE),
        "weight": torch.randn(BLOCK, HEADS),
        "compress_block_size": BLOCK,
        "compress_stride": STRIDE,
        "actual_seq_len": [40, TOKENS],
        "impl": "reference",
    }
    return legal | changes


def sized(tokens=TOKENS, heads=HEADS, head_size=HEAD_SIZE, block=BLOCK, stride=STRIDE):
    """A call whose tensors fit its numbers, whether these are legal or not."""
    return arguments(
        input=torch.zeros(tokens, heads, head_size),
        weight=torch.zeros(block, heads),
        compress_block_size=block,
        compress_stride=stride,
        actual_seq_len=[tokens],
    )


def refused(error, argument, call=nsa_compress, **changes):
    with pytest.raises(error) as caught:
        call(**arguments(**changes))
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected ")
    assert ", got " in str(caught.value)
    return str(caught.value)


def test_the_legal_call_is_legal():
    assert nsa_compress(**arguments()).shape == (1 + 2, HEADS, HEAD_SIZE)


@pytest.mark.parametrize("argument", ["input", "weight"])
@pytest.mark.parametrize("value", [None, 3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", ["compress_block_size", "compress_stride"])
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=lambda v: repr(v))
def test_integers_are_ints(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_dtypes_that_no_one_computes_in(dtype):
    tensors = {name: torch.zeros(shape).to(dtype) for name, shape in (("input", (96, 2, 32)), ("weight", (32, 2)))}
    refused(ArgumentTypeError, "input.dtype", **tensors)


def test_tensors_agree():
    assert "torch.float16" in refused(ArgumentTypeError, "weight.dtype", weight=torch.randn(BLOCK, HEADS).half())
    assert "meta" in refused(ArgumentValueError, "weight.device", weight=torch.randn(BLOCK, HEADS, device="meta"))
    refused(ArgumentTypeError, "weight", weight=torch.randn(BLOCK, HEADS).to_sparse())
    refused(ArgumentTypeError, "input", input=torch.randn(TOKENS, HEADS, HEAD_SIZE).to_sparse())


@pytest.mark.parametrize("shape", [(), (96,), (96, 64), (1, 96, 2, 32)], ids=str)
def test_input_has_three_dimensions(shape):
    refused(ArgumentValueError, "input", input=torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (32,), (32, 2, 1)], ids=str)
def test_weight_has_two_dimensions(shape):
    refused(ArgumentValueError, "weight", weight=torch.zeros(shape))


@pytest.mark.parametrize(
    ("argument", "weight"),
    [("weight.shape[0]", (16, HEADS)), ("weight.shape[1]", (BLOCK, 1)), ("weight.shape[0]", (0, 0))],
)
def test_weight_fits(argument, weight):
    refused(ArgumentValueError, argument, weight=torch.zeros(weight))


LIMITS = [
    ("compress_block_size", "block", [16, 32, 128], [0, -16, 8, 18, 31, 144]),
    ("compress_stride", "stride", [16, 32], [0, -16, 8, 17, 48, 144]),
    ("input.shape[1] (N)", "heads", [1, 7, 128], [0, 129]),
    ("input.shape[2] (D)", "head_size", [16, 48, 256], [0, 8, 18, 250, 272, 1024]),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        # A legal stride needs a window that is at least as long.
        extra = {"stride": 16} if name == "block" else {}
        assert nsa_compress(**sized(tokens=160, **extra, **{name: value})).shape[0] > 0
    for value in illegal:  # no tensor has a negative size: there the number alone is wrong
        call = sized(tokens=160, **{name: value}) if value >= 0 else sized(tokens=160) | {argument: value}
        refused(ArgumentValueError, argument, **call)


def test_huge_integers_are_named_too():
    refused(ArgumentValueError, "compress_block_size", compress_block_size=2**80)
    refused(ArgumentValueError, "compress_stride", compress_stride=2**80)
    refused(ArgumentValueError, "actual_seq_len[-1]", actual_seq_len=[2**80])


@pytest.mark.parametrize(
    "lengths",
    [
        None,
        96,
        96.0,
        "96",
        {96},
        iter([96]),
        [96.0],
        [40, True],
        ["96"],
        [None],
        [[96]],
        [torch.tensor(96)],
        np.array([96.0]),
        np.array([True]),
        np.array(["96"]),
        torch.tensor([96.0]),
        torch.tensor([True]),
    ],
    ids=repr,
)
def test_lengths_of_a_wrong_type(lengths):
    refused(ArgumentTypeError, "actual_seq_len", actual_seq_len=lengths)


def test_entries_are_told_from_equal_ones_of_another_type():
    assert nsa_compress(**arguments(actual_seq_len=[1, TOKENS])).shape[0] == 4
    refused(ArgumentTypeError, "actual_seq_len", actual_seq_len=[True, TOKENS])
    refused(ArgumentTypeError, "actual_seq_len", actual_seq_len=[1.0, TOKENS])


@pytest.mark.parametrize(
    "lengths",
    [
        [],
        (),
        np.array([], dtype=np.int64),
        [-1, TOKENS],
        [0, TOKENS],
        [50, 40, TOKENS],
        [40, TOKENS, 95],
        np.array([[TOKENS]]),
        np.array(TOKENS),
        torch.tensor([[TOKENS]]),
        torch.tensor(TOKENS),
        torch.tensor([TOKENS], device="meta"),
    ],
    ids=repr,
)
def test_lengths_of_a_wrong_value(lengths):
    refused(ArgumentValueError, "actual_seq_len", actual_seq_len=lengths)


def test_lengths_that_do_not_end_at_the_last_token():
    for lengths in ([95], [97], [40, 56]):
        message = refused(ArgumentValueError, "actual_seq_len[-1]", actual_seq_len=lengths)
        assert "T = 96" in message
    refused(ArgumentValueError, "actual_seq_len[-1]", input=torch.zeros(0, HEADS, HEAD_SIZE))


def test_a_device_tensor_of_lengths_is_refused_with_a_reason():
    message = refused(ArgumentValueError, "actual_seq_len", actual_seq_len=torch.tensor([96], device="meta"))
    assert "stall" in message
    assert "tolist" in message


@pytest.mark.parametrize(
    "lengths",
    [
        [40, 40, 96, 96],
        (40, 96),
        np.array([40, 96]),
        np.array([40, 96], dtype=np.uint8),
        [np.int32(40), 96],
        torch.tensor([40, 96]),
        torch.tensor([40, 96], dtype=torch.int32),
        torch.tensor([40, 0, 96, 0])[::2],
    ],
    ids=repr,
)
def test_every_kind_of_length_list_means_the_same(lengths):
    call = arguments()
    assert torch.equal(nsa_compress(**call | {"actual_seq_len": lengths}), nsa_compress(**call))


def test_impl_is_one_of_three():
    for name in ("cuda", "", "Triton"):
        assert "auto, triton, reference" in refused(ArgumentValueError, "impl", impl=name)
    for value in (None, 3):
        refused(ArgumentTypeError, "impl", impl=value)


def test_triton_does_not_compute_in_float64():
    tensors = {"input": torch.randn(96, 2, 32).double(), "weight": torch.randn(32, 2).double()}
    assert "reference" in refused(ArgumentTypeError, "input.dtype", impl="triton", **tensors)


def test_types_are_checked_before_values():
    refused(ArgumentTypeError, "compress_stride", compress_block_size=18, compress_stride=None, actual_seq_len=[])
    refused(ArgumentTypeError, "weight.dtype", weight=torch.randn(3).half(), actual_seq_len=[])
    refused(ArgumentTypeError, "actual_seq_len", compress_block_size=18, actual_seq_len=None)


def test_a_leading_zero_is_for_the_vendor_spelling():
    assert "npu_" in refused(ArgumentValueError, "actual_seq_len", actual_seq_len=[0, TOKENS])
    assert npu_nsa_compress(**arguments(actual_seq_len=[0, TOKENS])).shape[0] == 5
    refused(ArgumentValueError, "actual_seq_len", call=npu_nsa_compress, actual_seq_len=[-1, TOKENS])


@pytest.mark.parametrize("call", [nsa_compress_grad, npu_nsa_compress_grad])
def test_the_gradient_checks_grad_and_the_rest(call):
    grad = torch.zeros(3, HEADS, HEAD_SIZE)
    assert [tensor.shape for tensor in call(**arguments(grad=grad))] == [(TOKENS, HEADS, HEAD_SIZE), (BLOCK, HEADS)]
    refused(ArgumentTypeError, "grad", call, grad=None)
    refused(ArgumentTypeError, "grad.dtype", call, grad=grad.half())
    refused(ArgumentValueError, "grad.device", call, grad=grad.to("meta"))
    for shape in ((4, HEADS, HEAD_SIZE), (3, HEADS), (3, HEADS, 16), ()):
        assert "[3, 2, 32]" in refused(ArgumentValueError, "grad.shape", call, grad=torch.zeros(shape))
    refused(ArgumentValueError, "compress_stride", call, grad=grad, compress_stride=48)
    refused(ArgumentTypeError, "actual_seq_len", call, grad=grad, actual_seq_len=None)


def test_registered_operators_check_by_themselves():
    """torch.ops and compiled graphs do not come through the checks of the public functions."""
    input, weight = torch.randn(TOKENS, HEADS, HEAD_SIZE), torch.randn(BLOCK, HEADS)
    for lengths in ([TOKENS + 1], [50, 40, TOKENS], []):
        with pytest.raises(ArgumentValueError):
            torch.ops.nsa_triton.compress(input, weight, BLOCK, STRIDE, lengths, "reference")
    with pytest.raises(ArgumentValueError):
        torch.ops.nsa_triton.compress_grad(input[:9], input, weight, BLOCK, STRIDE, [TOKENS], "reference")
    with pytest.raises(ArgumentValueError):
        torch.ops.nsa_triton.compress(input, weight, BLOCK, STRIDE, [TOKENS], "fast")


GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_tensor(rng, shape):
    shape = list(shape)
    if rng.random() < 0.15:
        shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 16])
    if rng.random() < 0.05:
        shape.append(1)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    tensor = torch.zeros([max(0, size) for size in shape], dtype=rng.choice([*dtypes, torch.float32, torch.int8]))
    return tensor.transpose(0, -1).contiguous().transpose(0, -1) if rng.random() < 0.3 else tensor


def random_call(rng):
    lengths = [rng.choice([0, 1, 15, 16, 31, 48, 100]) for _ in range(rng.randrange(1, 5))]
    ends = np.cumsum(lengths)
    block, stride = rng.choice([16, 16, 32, 48, 128, 7]), rng.choice([16, 16, 16, 32, 0, -16])
    heads, head_size = rng.choice([1, 2, 5, 128]), rng.choice([16, 32, 80, 256, 18])
    call = {
        "input": random_tensor(rng, (int(ends[-1]), heads, head_size)),
        "weight": random_tensor(rng, (block, heads)),
        "compress_block_size": block,
        "compress_stride": stride,
        "actual_seq_len": rng.choice([list, tuple, np.asarray, torch.as_tensor])(ends),
    }
    if rng.random() < 0.5:
        call["weight"] = call["weight"].to(call["input"].dtype)
    while rng.random() < 0.2:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call


def succeeds(function, **call):
    """Whether a call returns; if it raises, then one of the errors of this package, with all its parts."""
    try:
        function(**call, impl="reference")
    except NsaError as error:
        return ": expected " not in str(error)
    return True


@pytest.mark.parametrize("function", [nsa_compress, npu_nsa_compress])
def test_random_and_garbage_calls_work_or_raise_a_named_error(function):
    rng = random.Random(20)
    assert 100 < sum(succeeds(function, **random_call(rng)) for _ in range(1500)) < 1400


@pytest.mark.parametrize("function", [nsa_compress_grad, npu_nsa_compress_grad])
def test_random_and_garbage_gradients_work_or_raise_a_named_error(function):
    rng, done = random.Random(21), 0
    for _ in range(800):
        call, windows = random_call(rng), rng.randrange(3)
        like = call["input"] if isinstance(call["input"], torch.Tensor) else torch.zeros(1, 2, 32)
        grad = like.new_zeros(windows, *like.shape[1:])
        done += succeeds(function, **call, grad=grad if rng.random() < 0.9 else rng.choice(GARBAGE))
    assert 10 < done < 790
