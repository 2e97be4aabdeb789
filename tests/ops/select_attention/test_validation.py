"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import limits
from nsa_triton.ops.select_attention import nsa_select_attention, nsa_select_attention_grad
from tests.ops.ragged_validation import (
    RAGGED_LIMITS,
    RaggedCalls,
    RaggedValidation,
    either,
    ragged_arguments,
    ragged_parts,
)

GIVEN = ("grad", "attention_out", "softmax_max", "softmax_sum")
TENSORS = ("query", "key", "value", "topk_indices")


def arguments(*, queries=(2, 1), heads=4, kv_heads=2, block=32, entries=3, gradient=False, **changes) -> dict[str, Any]:
    """A legal call on the reference implementation; `changes` replace sizes and arguments."""
    rows = sum(queries)
    own: dict[str, Any] = {
        "topk_indices": torch.zeros(rows, kv_heads, entries, dtype=torch.int32),
        "select_block_size": block,
        "select_block_count": entries,
    }
    if gradient:
        own |= {name: torch.ones(rows, heads, 8) for name in GIVEN[2:]}
    return ragged_arguments(queries=queries, heads=heads, kv_heads=kv_heads, gradient=gradient, **own | changes)


CALLS = RaggedCalls(either(nsa_select_attention, nsa_select_attention_grad), arguments)
accepted, refused, refused_twice = CALLS.accepted, CALLS.refused, CALLS.refused_twice


def operator(gradient=False, **changes) -> Any:
    op = torch.ops.nsa_triton.select_attention_grad if gradient else torch.ops.nsa_triton.select_attention
    parts = ragged_parts(arguments(gradient=gradient)) | {"select_block_size": 32, "causal": True}
    return op(**parts | changes)


class TestRaggedValidation(RaggedValidation):
    calls = CALLS
    operator = staticmethod(operator)
    statistics = GIVEN[2:]
    bad_number: ClassVar[dict[str, Any]] = {"select_block_size": 24}
    bad_parts: ClassVar[list[dict[str, Any]]] = [
        {"topk_indices": torch.zeros(3, 2, 3)},
        {"topk_indices": torch.zeros(2, 2, 3, dtype=torch.int32)},
        {"select_block_size": 0},
    ]
    bad_statistics: ClassVar[dict[str, Any]] = {"softmax_sum": torch.zeros(3, 4)}

    def own_sizes(self, rng):
        return {"block": rng.choice([16, 32, 16, 7]), "entries": rng.choice([1, 3])}


def test_the_legal_calls_are_legal():
    assert [part.shape for part in accepted()] == [(3, 4, 8)] * 3
    assert [part.shape for part in accepted(gradient=True)] == [(3, 4, 16), (60, 2, 16), (60, 2, 8)]


@pytest.mark.parametrize("argument", [*TENSORS, *GIVEN, "atten_mask"])
@pytest.mark.parametrize("value", [None, 3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    if argument == "atten_mask" and value is None:
        accepted(atten_mask=None)
    elif argument in GIVEN:
        refused(ArgumentTypeError, argument, gradient=True, **{argument: value})
    else:
        refused_twice(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", [*TENSORS, *GIVEN])
def test_tensors_are_dense(argument):
    sparse = arguments(gradient=True)[argument].to_sparse()
    refused(ArgumentTypeError, argument, gradient=True, **{argument: sparse})


@pytest.mark.parametrize("argument", ["head_num", "select_block_size", "select_block_count"])
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=repr)
def test_integers_are_ints(argument, value):
    refused_twice(ArgumentTypeError, argument, **{argument: value})


def test_ids_are_integers_with_a_list_for_each_query_token_and_kv_head():
    ids = arguments()["topk_indices"]
    for dtype in (torch.float32, torch.bool):
        refused_twice(ArgumentTypeError, "topk_indices.dtype", topk_indices=ids.to(dtype))
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int64):
        accepted(topk_indices=ids.to(dtype))
    refused_twice(ArgumentValueError, "topk_indices.shape[0]", topk_indices=ids.new_zeros(4, 2, 3))
    refused_twice(ArgumentValueError, "topk_indices.shape[1]", topk_indices=ids.new_zeros(3, 4, 3))
    refused_twice(ArgumentValueError, "select_block_count", topk_indices=ids.new_zeros(3, 2, 4))
    refused_twice(ArgumentValueError, "select_block_count", select_block_count=4)


def test_causal_and_masks_agree():
    mask = torch.zeros(1)
    value: Any
    for value in (0, 1, "yes", torch.tensor(True), np.bool_(True)):
        assert "True, False or None" in refused(ArgumentTypeError, "causal", causal=value)
        assert "True or False" in refused(ArgumentTypeError, "causal", gradient=True, causal=value)
    refused(ArgumentTypeError, "causal", gradient=True, causal=None)
    assert "atten_mask is given" in refused_twice(ArgumentValueError, "causal", causal=False, atten_mask=mask)
    for causal in (True, False):
        accepted(causal=causal)
        accepted(causal=causal, gradient=True)
    accepted(causal=True, atten_mask=mask)
    accepted(causal=None, atten_mask=mask)


@pytest.mark.parametrize("name", [*TENSORS, *GIVEN])
def test_ranks(name):
    whole = arguments(gradient=True)[name]
    for wrong in (whole[0], whole[None], whole[0, 0, 0]):
        assert "3 dimensions [T" in refused(ArgumentValueError, name, gradient=True, **{name: wrong})


# argument in messages; sizes that change; legal and illegal values
LIMITS: list[Any] = [
    *RAGGED_LIMITS,
    ("select_block_size", "block", [16, 48, 128, 256], [0, -16, 8, 24, 63]),
    ("topk_indices.shape[2] (K)", "entries", [1, 7, 200], [0]),
    ("key.shape[0] (T2)", "keys", [(1, 0), (0, 70)], [(0, 0)]),
    ("head_num", "heads", [0, 2, 6, 64], [1, 5]),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        accepted(**{name: value})
        accepted(gradient=True, **{name: value})
    for value in illegal:
        refused_twice(ArgumentValueError, argument, **{name: value})


def far(**sizes) -> dict[str, Any]:
    """A gradient call that CANN takes but for its lengths; its tensors take no memory."""
    call = arguments(
        key_dim=192, value_dim=128, block=64, heads=1, kv_heads=1, gradient=True, dtype=torch.float16, **sizes
    )
    return {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in call.items()}


def test_documented_mode():
    cann: dict[str, Any] = {"key_dim": 192, "value_dim": 128, "block": 64, "keys": (192, 256), "dtype": torch.float16}
    beyond: Any = (
        ("query.dtype", {"dtype": torch.float32}),
        ("select_block_size", {"block": 144, "keys": (432, 432)}),
        ("topk_indices.shape[2] (K)", {"entries": 33, "keys": (2112, 2112)}),
        ("head_num / key.shape[1] (G)", {"heads": 66}),
        ("query.shape[1] (N1)", {"heads": 132, "kv_heads": 12}),
        ("query.shape[2] (Dk)", {"key_dim": 128}),
        ("value.shape[2] (Dv)", {"value_dim": 64}),
        ("len(actual_seq_qlen) (B)", {"queries": (1,) + (0,) * 1024, "keys": (192,) * 1025, "key_dim": 1}),
        ("shortest segment of keys", {"keys": (128, 256)}),
        ("largest remainder of a segment of keys by select_block_size", {"keys": (192, 250)}),
    )
    with limits("documented"):
        for gradient in (False, True):
            accepted(**cann, gradient=gradient)
        accepted(**cann | {"heads": 64, "queries": (0, 1)})
        for argument, changes in beyond:
            error = ArgumentTypeError if "dtype" in changes else ArgumentValueError
            assert "documented limit" in refused_twice(error, argument, **cann | changes)
        refused(
            ArgumentValueError, "longest segment of queries", gradient=True, **far(queries=(0, 131073), keys=(192, 192))
        )
        refused(error, "longest segment of keys", gradient=True, **far(queries=(1,), keys=(131136,)))
    for _, changes in beyond[1:]:
        accepted(**cann | changes | {"dtype": torch.float32})


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("checking_indices")
@pytest.mark.parametrize("gradient", [False, True])
def test_checked_ids_name_the_first_bad_entry(gradient):
    """The segments have two blocks and one; the third query token is the only one of the second segment."""
    ids = torch.tensor([[[0, 1, -1], [-1, 1, 0]], [[1, 1, 1], [-1, -1, -1]], [[0, -1, 0], [0, 0, 0]]])
    accepted(gradient=gradient, topk_indices=ids)
    bad: Any = (((0, 0, 1), 2, 1), ((1, 1, 2), -2, 1), ((2, 1, 0), 1, 0), ((2, 0, 2), 2**40, 0))
    for place, value, last in bad:
        wrong = ids.clone()
        wrong[place] = value
        name = f"topk_indices[{', '.join(map(str, place))}]"
        message = refused(ArgumentValueError, name, gradient=gradient, topk_indices=wrong)
        assert f"from -1 to {last}" in message
    wrong[2] = 99
    accepted(gradient=gradient, topk_indices=wrong, actual_seq_qlen=[2, 2])  # a row that is no query token


def test_ids_are_not_checked_by_default():
    accepted(topk_indices=torch.full((3, 2, 3), 99))
