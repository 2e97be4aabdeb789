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
    limits,
    nsa_gated_combine,
    nsa_gated_combine_grad,
)

TOKENS, HEADS, SIZE = 6, 2, 16
NAMES = ("compressed", "selected", "local", "gates")


def arguments(tokens=TOKENS, heads=HEADS, size=SIZE, **changes):
    """A legal call of nsa_gated_combine on the reference implementation, with some arguments changed."""
    branches = {name: torch.randn(tokens, heads, size) for name in NAMES[:3]}
    return {**branches, "gates": torch.randn(tokens, heads, 3), "impl": "reference", **changes}


def refused(error, argument, call=nsa_gated_combine, **changes):
    with pytest.raises(error) as caught:
        call(**arguments(**changes))
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected ")
    assert ", got " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("argument", NAMES)
@pytest.mark.parametrize("value", [None, 3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", NAMES)
def test_tensors_are_dense(argument):
    refused(ArgumentTypeError, argument, **{argument: arguments()[argument].to_sparse()})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.int64])
def test_dtypes_that_no_one_computes_in(dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in arguments().items() if name != "impl"}
    refused(ArgumentTypeError, "compressed.dtype", **tensors)


@pytest.mark.parametrize("argument", ["selected", "local"])
def test_branches_agree(argument):
    wrong = torch.randn(TOKENS, HEADS, SIZE)
    assert "torch.float32" in refused(ArgumentTypeError, f"{argument}.dtype", **{argument: wrong.half()})
    refused(ArgumentValueError, f"{argument}.device", **{argument: wrong.to("meta")})
    for shape in ((TOKENS, HEADS, 1), (TOKENS, 1, SIZE), (1, HEADS, SIZE), (HEADS, SIZE), (1, TOKENS, HEADS, SIZE), ()):
        assert "[6, 2, 16]" in refused(ArgumentValueError, f"{argument}.shape", **{argument: torch.zeros(shape)})


def test_gates_fit():
    refused(ArgumentValueError, "gates.device", gates=torch.zeros(TOKENS, HEADS, 3, device="meta"))
    for shape in ((6, 2), (6, 2, 2), (6, 2, 4), (3, 6, 2), (1, 2, 3), (6, 1, 3)):
        assert "[6, 2, 3]" in refused(ArgumentValueError, "gates.shape", gates=torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gates", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_gates_are_of_the_dtype_of_the_branches_or_float32(dtype, gates):
    tensors = {name: torch.zeros(TOKENS, HEADS, SIZE, dtype=dtype) for name in NAMES[:3]}
    tensors["gates"] = torch.zeros(TOKENS, HEADS, 3, dtype=gates)
    if gates in (dtype, torch.float32):
        assert nsa_gated_combine(**tensors, impl="reference").dtype == dtype
    else:
        refused(ArgumentTypeError, "gates.dtype", **tensors)


@pytest.mark.parametrize("shape", [(), (16,)], ids=str)
def test_branches_have_heads(shape):
    tensors = {name: torch.zeros(shape) for name in NAMES[:3]}
    assert "N1, Dv" in refused(ArgumentValueError, "compressed", **tensors)


LIMITS = [("compressed.shape[-2] (N1)", "heads"), ("compressed.shape[-1] (Dv)", "size")]


@pytest.mark.parametrize(("argument", "name"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name):
    for value in (1, 7, 300):
        assert value in nsa_gated_combine(**arguments(**{name: value})).shape
    refused(ArgumentValueError, argument, **{name: 0})
    with limits("documented"):
        assert nsa_gated_combine(**arguments()).shape == (TOKENS, HEADS, SIZE)


def test_impl_is_one_of_three():
    for name in ("cuda", "", "Triton"):
        assert "auto, triton, reference" in refused(ArgumentValueError, "impl", impl=name)
    for value in (None, 3):
        refused(ArgumentTypeError, "impl", impl=value)


def test_triton_does_not_compute_in_float64():
    tensors = {name: tensor.double() for name, tensor in arguments().items() if name != "impl"}
    assert "reference" in refused(ArgumentTypeError, "compressed.dtype", impl="triton", **tensors)


def test_types_are_checked_before_values():
    refused(ArgumentTypeError, "local.dtype", selected=torch.zeros(3), local=torch.zeros(3).half())
    refused(ArgumentTypeError, "gates.dtype", selected=torch.zeros(3), gates=torch.zeros(3).half())
    refused(ArgumentTypeError, "impl", impl=None, compressed=torch.zeros(3))


def test_the_gradient_checks_grad_and_the_rest():
    call, grad = nsa_gated_combine_grad, torch.zeros(TOKENS, HEADS, SIZE)
    found = [tensor.shape for tensor in call(**arguments(grad=grad))]
    assert found == [(TOKENS, HEADS, SIZE)] * 3 + [(TOKENS, HEADS, 3)]
    refused(ArgumentTypeError, "grad", call, grad=None)
    refused(ArgumentTypeError, "grad.dtype", call, grad=grad.half())
    refused(ArgumentValueError, "grad.device", call, grad=grad.to("meta"))
    for shape in ((TOKENS + 1, HEADS, SIZE), (TOKENS, HEADS), ()):
        assert "[6, 2, 16]" in refused(ArgumentValueError, "grad.shape", call, grad=torch.zeros(shape))
    refused(ArgumentValueError, "gates.shape", call, grad=grad, gates=torch.zeros(TOKENS, HEADS, 2))


def test_registered_operators_check_by_themselves():
    """torch.ops and compiled graphs do not come through the checks of the public functions."""
    *branches, gates, _ = arguments().values()
    with pytest.raises(ArgumentValueError):
        torch.ops.nsa_triton.gated_combine(*branches, gates[:1], "reference")
    with pytest.raises(ArgumentValueError):
        torch.ops.nsa_triton.gated_combine_grad(branches[0][:1], *branches, gates, "reference")
    with pytest.raises(ArgumentValueError):
        torch.ops.nsa_triton.gated_combine(*branches, gates, "fast")


GARBAGE = [None, True, -1, 0, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_call(rng, names):
    lead = [rng.choice([0, 1, 2, 5]) for _ in range(rng.randrange(4))]
    heads, size = rng.choice([1, 2, 5]), rng.choice([0, 1, 7, 16])
    dtype = rng.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8])
    call = {}
    for name in names:
        shape = [*lead, heads, 3 if name == "gates" else size]
        if rng.random() < 0.1:
            shape[rng.randrange(len(shape))] += 1
        if rng.random() < 0.05:
            shape.append(1)
        call[name] = torch.zeros(shape, dtype=torch.float32 if rng.random() < 0.05 else dtype)
    while rng.random() < 0.1:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call


def error_of(function, **call):
    """The message of a call that raises, which must be an error of this package; "" if it returns."""
    try:
        function(**call, impl="reference")
    except NsaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("function", "names"), [(nsa_gated_combine, NAMES), (nsa_gated_combine_grad, ("grad", *NAMES))], ids=lambda v: ""
)
def test_random_and_garbage_calls_work_or_raise_a_named_error(function, names):
    rng = random.Random(22)
    errors = [error_of(function, **random_call(rng, names)) for _ in range(1000)]
    assert 100 < errors.count("") < 900
    assert all(": expected " in error for error in errors if error)
