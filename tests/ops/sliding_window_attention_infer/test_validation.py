"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import limits
from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer
from tests.ops.calls import Calls
from tests.ops.paged_validation import PAGED_LIMITS, PagedValidation, paged_arguments, paged_parts


def arguments(*, window=20, **changes) -> dict[str, Any]:
    """A legal call on the reference implementation; `changes` replace sizes and arguments."""
    return paged_arguments(**{"window_size": window} | changes)


CALLS = Calls(nsa_sliding_window_attention_infer, arguments)
accepted, refused = CALLS.accepted, CALLS.refused


def operator(**changes) -> Any:
    return torch.ops.nsa_triton.sliding_window_attention_infer(**paged_parts() | {"window_size": 20} | changes)


class TestPagedValidation(PagedValidation):
    calls = CALLS
    operator = staticmethod(operator)
    bad_number: ClassVar[dict[str, Any]] = {"window_size": 0}

    def own_sizes(self, rng):
        return {"window": rng.choice([1, 7, 64, 1000, 0])}


@pytest.mark.parametrize("argument", ["query", "key", "value", "block_table"])
@pytest.mark.parametrize("value", [None, 3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    if value is None and argument == "block_table":
        accepted(block_table=None)
    else:
        refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", ["query", "key", "value", "block_table"])
def test_tensors_are_dense(argument):
    refused(ArgumentTypeError, argument, **{argument: arguments()[argument].to_sparse()})


INTEGERS = ["head_num", "key_value_head_num", "window_size", "page_block_size"]


@pytest.mark.parametrize("argument", INTEGERS)
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=repr)
def test_integers_are_ints(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


# argument in messages; sizes that change together; legal and illegal values
LIMITS: list[Any] = [
    ("window_size", "window", [1, 15, 16, 512, 2**31 - 1], [0, -1, 2**31, 2**70]),
    *PAGED_LIMITS,
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        accepted(**{name: value})
    for value in illegal:
        refused(ArgumentValueError, argument, **{name: value})


def test_cann_documents_no_further_limits():
    with limits("documented"):
        accepted(dtype=torch.float32, heads=64, kv_heads=1, key_dim=300, value_dim=7, page=48, tokens=9, window=3)


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("checking_indices")
def test_checked_pages_name_the_first_bad_entry():
    """40 tokens on pages of 32, of which a window of 20 sees tokens 20 to 39."""
    accepted()
    table = torch.tensor([[0, 8, -1, -1], [-1, 3, 99, 99]], dtype=torch.int32)
    assert "8 pages" in refused(ArgumentValueError, "block_table[0, 1]", block_table=table)
    table[0, 1] = 1
    assert "8 pages" in refused(ArgumentValueError, "block_table[1, 0]", block_table=table)
    accepted(block_table=table, window=8)  # tokens 32 to 39


@pytest.mark.usefixtures("checking_indices")
def test_only_what_is_read_is_checked():
    """A window of 33 tokens on pages of 32: token 69 sees tokens 37 to 69, and token 63 tokens 31 to 63."""
    for sizes, touched in (
        ({"actual_seq_kvlen": [70, 70]}, (1, 2)),
        ({"actual_seq_kvlen": [64, 64]}, (0, 1)),
        ({"actual_seq_kvlen": [65, 65]}, (1, 2)),
        ({"actual_seq_kvlen": [65, 65], "tokens": 2}, (0, 1, 2)),
        (
            {"actual_seq_kvlen": [65, 65], "tokens": 2, "actual_seq_qlen": [1, 1]},
            (1, 2),
        ),  # the second rows are no one's
        ({"actual_seq_kvlen": [128, 128]}, (2, 3)),
        ({"actual_seq_kvlen": [70, 0]}, ()),
    ):
        for column in range(4):
            table = torch.arange(8, dtype=torch.int32).view(2, 4)
            table[1, column] = -1
            call: dict[str, Any] = {**sizes, "window": 33, "block_table": table}
            if column in touched:
                refused(ArgumentValueError, f"block_table[1, {column}]", **call)
            else:
                accepted(**call)


def test_indices_are_not_checked_by_default():
    accepted(block_table=torch.full((2, 4), 99, dtype=torch.int32))
