"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError, NsaError
from nsa_triton.limits import limits, rows
from nsa_triton.ops.sliding_window_attention import nsa_sliding_window_attention, nsa_sliding_window_attention_grad

GIVEN = ("grad", "attention_out", "lse")
TENSORS = ("query", "key", "value")


def arguments(
    *,
    queries=(2, 1),
    keys=(40, 20),
    heads=4,
    kv_heads=2,
    key_dim=16,
    value_dim=8,
    dtype=torch.float32,
    gradient=False,
    **changes,
) -> dict[str, Any]:
    """A legal call on the reference implementation; `changes` replace arguments."""
    count, tokens = sum(queries), sum(keys)
    legal = {
        "query": torch.zeros(count, heads, key_dim, dtype=dtype),
        "key": torch.zeros(tokens, kv_heads, key_dim, dtype=dtype),
        "value": torch.zeros(tokens, kv_heads, value_dim, dtype=dtype),
        "scale_value": 0.5,
        "head_num": heads,
        "window_size": 32,
        "actual_seq_qlen": list(accumulate(queries)),
        "actual_seq_kvlen": list(accumulate(keys)),
        "impl": "reference",
    }
    if gradient:
        legal |= {name: torch.zeros(count, heads, value_dim, dtype=dtype) for name in GIVEN[:2]}
        legal |= {"lse": torch.ones(count, heads)}
    return legal | changes


def accepted(*, gradient=False, **changes) -> Any:
    function: Any = nsa_sliding_window_attention_grad if gradient else nsa_sliding_window_attention
    return function(**arguments(gradient=gradient, **changes))


def refused(error, argument, **changes):
    with pytest.raises(error) as caught:
        accepted(**changes)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected "), caught.value
    assert ", got " in str(caught.value)
    return str(caught.value)


def refused_twice(error, argument, **changes):
    """By the forward function and by the gradient."""
    refused(error, argument, gradient=True, **changes)
    return refused(error, argument, **changes)


def test_the_legal_calls_are_legal():
    assert [part.shape for part in accepted()] == [(3, 4, 8), (3, 4)]
    assert [part.shape for part in accepted(gradient=True)] == [(3, 4, 16), (60, 2, 16), (60, 2, 8)]


@pytest.mark.parametrize("argument", [*TENSORS, *GIVEN])
@pytest.mark.parametrize("value", [None, 1, [1.0], np.zeros((3, 4, 16))], ids=lambda value: type(value).__name__)
def test_tensors_are_tensors(argument, value):
    refused(ArgumentTypeError, argument, gradient=True, **{argument: value})
    if argument in TENSORS:
        refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", [*TENSORS, *GIVEN])
def test_tensors_are_dense(argument):
    sparse = arguments(gradient=True)[argument].to_sparse()
    refused(ArgumentTypeError, argument, gradient=True, **{argument: sparse})


@pytest.mark.parametrize("argument", ["head_num", "window_size"])
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=repr)
def test_integers_are_ints(argument, value):
    refused_twice(ArgumentTypeError, argument, **{argument: value})


def test_scales_are_finite_real_numbers():
    value: Any
    for value in (None, "1", True, 1j, torch.tensor(1.0), [1.0], np.bool_(True)):
        refused_twice(ArgumentTypeError, "scale_value", scale_value=value)
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, np.float32("inf")):
        refused_twice(ArgumentValueError, "scale_value", scale_value=value)
    for value in (0, -1, 1e-30, np.float32(0.5), np.float64(0.5), np.int32(2)):
        accepted(scale_value=value)


def test_implementations():
    for value in ("cuda", ""):
        assert "auto, triton, reference" in refused_twice(ArgumentValueError, "impl", impl=value)
    refused_twice(ArgumentTypeError, "impl", impl=None)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.int64])
def test_dtypes_that_no_one_computes_in(dtype):
    refused_twice(ArgumentTypeError, "query.dtype", dtype=dtype)


def test_tensors_agree():
    given = arguments(gradient=True)
    for name in ("key", "value", "grad", "attention_out"):
        changes = {name: given[name].half()}
        assert "float32" in refused(ArgumentTypeError, f"{name}.dtype", gradient=True, **changes)
    lse = given["lse"].half()
    assert "torch.float32" in refused(ArgumentTypeError, "lse.dtype", gradient=True, dtype=torch.float16, lse=lse)
    for name in (*TENSORS[1:], *GIVEN):
        changes = {name: given[name].to("meta")}
        assert "meta" in refused(ArgumentValueError, f"{name}.device", gradient=True, **changes)


def test_triton_does_not_compute_in_float64():
    for gradient in (False, True):
        with pytest.raises(ArgumentTypeError, match=r"query\.dtype.*reference"):
            accepted(dtype=torch.float64, impl="triton", gradient=gradient)


@pytest.mark.parametrize("name", [*TENSORS, *GIVEN])
def test_ranks(name):
    whole = arguments(gradient=True)[name]
    for wrong in (whole[0], whole[None], whole.flatten()[0]):
        expected = f"{whole.dim()} dimensions [T"
        assert expected in refused(ArgumentValueError, name, gradient=True, **{name: wrong})


def test_shapes_agree():
    zeros = torch.zeros
    refused_twice(ArgumentValueError, "value.shape[0]", value=zeros(59, 2, 8))
    refused_twice(ArgumentValueError, "value.shape[1]", value=zeros(60, 1, 8))
    refused_twice(ArgumentValueError, "key.shape[2]", key=zeros(60, 2, 8))
    for name, shape in (("grad", (3, 4, 8)), ("attention_out", (3, 4, 8)), ("lse", (3, 4))):
        for dimension in range(len(shape)):
            wrong = list(shape)
            wrong[dimension] += 1
            message = refused(ArgumentValueError, f"{name}.shape", gradient=True, **{name: zeros(wrong)})
            assert str(list(shape)) in message


# argument in messages; argument or size that changes; legal and illegal values
LIMITS: list[Any] = [
    ("window_size", "window_size", [1, 7, 60, 2**31 - 1], [0, -1, 2**31]),
    ("query.shape[1] (N1)", "heads", [2, 6, 64], [0]),
    ("query.shape[2] (Dk)", "key_dim", [1, 7, 192, 300], [0]),
    ("value.shape[2] (Dv)", "value_dim", [1, 7, 128, 300], [0]),
    ("key.shape[1] (N2)", "kv_heads", [1, 4], [0]),
    ("head_num", "heads", [2, 6], [1, 5]),
    ("actual_seq_kvlen", "queries", [(2, 0), (0, 0), (0, 5)], [(2, 1, 1), (3,)]),
    ("actual_seq_qlen", "keys", [(0, 0), (1, 0), (0, 70)], []),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[0] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        accepted(**{name: value})
        accepted(gradient=True, **{name: value})
    for value in illegal:
        refused_twice(ArgumentValueError, argument, **{name: value})


def test_the_number_of_heads_is_that_of_the_queries():
    for value in (3, 8, 0, -4, 2**70):
        refused_twice(ArgumentValueError, "head_num", head_num=value)


def test_nothing_else_is_documented():
    """CANN has no such operator."""
    assert all(limit.documented == limit.structural for limit in rows("nsa_sliding_window_attention"))
    with limits("documented"):
        accepted(heads=258, kv_heads=1, gradient=True)
        refused_twice(ArgumentValueError, "window_size", window_size=0)


BAD_TYPES: list[Any] = [
    None, 60, 60.0, "60", {60}, iter([60]), [40.0, 60], [True, 60], ["40", 60], [None, 60], [[40], [60]],
    np.array([60.0]), np.array([True]), torch.tensor([60.0]), torch.tensor([True]),
]  # fmt: skip


@pytest.mark.parametrize("argument", ["actual_seq_kvlen", "actual_seq_qlen"])
@pytest.mark.parametrize("lengths", BAD_TYPES, ids=repr)
def test_lengths_of_a_wrong_type(argument, lengths):
    refused_twice(ArgumentTypeError, argument, **{argument: lengths})


@pytest.mark.parametrize(
    "lengths",
    [[], [-1, 3], [3, 2], [0, 3, 2], np.array([[1, 3]]), np.array(3), torch.tensor([[1, 3]]), torch.tensor(3)],
    ids=repr,
)
def test_lengths_of_a_wrong_value(lengths):
    for argument in ("actual_seq_qlen", "actual_seq_kvlen"):
        refused_twice(ArgumentValueError, argument, **{argument: lengths})


def test_lengths_are_prefix_sums_within_the_tensors():
    assert "T1 = 3" in refused_twice(ArgumentValueError, "actual_seq_qlen[-1]", actual_seq_qlen=[2, 4])
    assert "T2 = 60" in refused_twice(ArgumentValueError, "actual_seq_kvlen[-1]", actual_seq_kvlen=[40, 61])
    refused_twice(ArgumentValueError, "actual_seq_kvlen[-1]", actual_seq_kvlen=[40, 2**40])
    accepted(actual_seq_qlen=[0, 2], actual_seq_kvlen=[0, 59])
    assert "2 entries" in refused_twice(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[60])
    on_device = torch.zeros(2, dtype=torch.int64, device="meta")
    for argument in ("actual_seq_qlen", "actual_seq_kvlen"):
        assert "on the CPU" in refused_twice(ArgumentValueError, argument, **{argument: on_device})


def test_types_are_checked_before_values():
    refused_twice(ArgumentTypeError, "head_num", window_size=0, head_num=None)
    refused_twice(ArgumentTypeError, "actual_seq_kvlen", window_size=0, actual_seq_kvlen=None)
    refused_twice(ArgumentTypeError, "key.dtype", window_size=0, key=torch.zeros(60, 2, 16).half())


# --- the registered operators ----------------------------------------------------------------------------------------


def operator(gradient=False, **changes) -> Any:
    call = arguments(gradient=gradient)
    order = ("grad", *TENSORS, *GIVEN[1:]) if gradient else TENSORS
    parts = {name: call[name] for name in order}
    parts |= {"query_ends": [2, 3], "key_ends": [40, 60], "scale": 0.5, "window_size": 32}
    ops = torch.ops.nsa_triton
    op = ops.sliding_window_attention_grad if gradient else ops.sliding_window_attention
    return op(**parts | {"impl": "reference"} | changes)


@pytest.mark.parametrize("gradient", [False, True])
def test_the_registered_operators_check_by_themselves(gradient):
    assert operator(gradient)[0].shape == (3, 4, 16 if gradient else 8)
    bad: list[dict[str, Any]] = [
        {"query": torch.zeros(3, 3, 16)},
        {"key": torch.zeros(60, 2, 8)},
        {"value": torch.zeros(59, 2, 8)},
        {"query_ends": [2, 4]},
        {"query_ends": [3]},
        {"query_ends": []},
        {"key_ends": [60, 40]},
        {"window_size": 0},
        {"impl": "fast"},
        *([{"grad": torch.zeros(3, 4, 9)}, {"lse": torch.zeros(3, 3)}] if gradient else []),
    ]
    for changes in bad:
        with pytest.raises((ArgumentValueError, ArgumentTypeError)):
            operator(gradient, **changes)


# --- garbage ---------------------------------------------------------------------------------------------------------

GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_call(rng):
    segments = rng.choice([1, 2, 3])
    sizes: dict[str, Any] = {
        "queries": [rng.choice([0, 1, 2]) for _ in range(segments)],
        "keys": [rng.choice([0, 1, 20, 33]) for _ in range(segments)],
        "kv_heads": rng.choice([1, 2]),
        "heads": rng.choice([2, 4, 6]),
        "key_dim": rng.choice([16, 5]),
        "window_size": rng.choice([1, 7, 100, 0]),
        "gradient": rng.random() < 0.5,
    }
    call = arguments(**sizes)
    kind = rng.choice([list, tuple, np.asarray, torch.as_tensor])
    for name in ("actual_seq_qlen", "actual_seq_kvlen"):
        call[name] = kind(call[name])
    if rng.random() < 0.2:
        name = rng.choice([name for name in (*TENSORS, *GIVEN) if name in call])
        shape = list(call[name].shape)
        shape[rng.randrange(len(shape))] += 1
        call[name] = torch.zeros(shape, dtype=rng.choice([call[name].dtype, torch.float16, torch.int64]))
    while rng.random() < 0.2:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call | {"impl": "reference"}


def succeeds(call):
    """Whether a call returns; if it raises, then one of the errors of this package, with all its parts."""
    function = nsa_sliding_window_attention_grad if "grad" in call else nsa_sliding_window_attention
    try:
        function(**call)
    except NsaError as error:
        return ": expected " not in str(error)
    return True


def test_random_and_garbage_calls_work_or_raise_a_named_error():
    rng = random.Random(20)
    assert 100 < sum(succeeds(random_call(rng)) for _ in range(1000)) < 900
