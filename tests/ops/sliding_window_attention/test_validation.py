"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import limits, rows
from nsa_triton.ops.sliding_window_attention import nsa_sliding_window_attention, nsa_sliding_window_attention_grad
from tests.ops.ragged_validation import (
    RAGGED_LIMITS,
    RaggedCalls,
    RaggedValidation,
    either,
    ragged_arguments,
    ragged_parts,
)

GIVEN = ("grad", "attention_out", "lse")
TENSORS = ("query", "key", "value")


def arguments(*, queries=(2, 1), heads=4, gradient=False, **changes) -> dict[str, Any]:
    """A legal call on the reference implementation; `changes` replace sizes and arguments."""
    own: dict[str, Any] = {"window_size": 32}
    if gradient:
        own |= {"lse": torch.ones(sum(queries), heads)}
    return ragged_arguments(queries=queries, heads=heads, gradient=gradient, **own | changes)


CALLS = RaggedCalls(either(nsa_sliding_window_attention, nsa_sliding_window_attention_grad), arguments)
accepted, refused, refused_twice = CALLS.accepted, CALLS.refused, CALLS.refused_twice


def operator(gradient=False, **changes) -> Any:
    ops = torch.ops.nsa_triton
    op = ops.sliding_window_attention_grad if gradient else ops.sliding_window_attention
    return op(**ragged_parts(arguments(gradient=gradient)) | {"window_size": 32} | changes)


class TestRaggedValidation(RaggedValidation):
    calls = CALLS
    operator = staticmethod(operator)
    statistics = GIVEN[2:]
    bad_number: ClassVar[dict[str, Any]] = {"window_size": 0}
    bad_statistics: ClassVar[dict[str, Any]] = {"lse": torch.zeros(3, 3)}

    def own_sizes(self, rng):
        return {"window_size": rng.choice([1, 7, 100, 0])}


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


@pytest.mark.parametrize("name", [*TENSORS, *GIVEN])
def test_ranks(name):
    whole = arguments(gradient=True)[name]
    for wrong in (whole[0], whole[None], whole.flatten()[0]):
        expected = f"{whole.dim()} dimensions [T"
        assert expected in refused(ArgumentValueError, name, gradient=True, **{name: wrong})


# argument in messages; argument or size that changes; legal and illegal values
LIMITS: list[Any] = [
    *RAGGED_LIMITS,
    ("window_size", "window_size", [1, 7, 60, 2**31 - 1], [0, -1, 2**31]),
    ("query.shape[1] (N1)", "heads", [2, 6, 64], [0]),
    ("head_num", "heads", [2, 6], [1, 5]),
    ("actual_seq_qlen", "keys", [(0, 0), (1, 0), (0, 70)], []),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[0] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        accepted(**{name: value})
        accepted(gradient=True, **{name: value})
    for value in illegal:
        refused_twice(ArgumentValueError, argument, **{name: value})


def test_nothing_else_is_documented():
    """CANN has no such operator."""
    assert all(limit.documented == limit.structural for limit in rows("nsa_sliding_window_attention"))
    with limits("documented"):
        accepted(heads=258, kv_heads=1, gradient=True)
        refused_twice(ArgumentValueError, "window_size", window_size=0)
