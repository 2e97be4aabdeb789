"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.limits import limits
from nsa_triton.ops.select_attention_infer import nsa_select_attention_infer
from tests.ops.calls import Calls
from tests.ops.paged_validation import PAGED_LIMITS, PagedValidation, paged_arguments, paged_parts


def arguments(*, batch=2, tokens=1, kv_heads=2, block=32, entries=3, **changes) -> dict[str, Any]:
    """A legal call on the reference implementation; `changes` replace sizes and arguments."""
    own = {
        "topk_indices": torch.zeros(batch, tokens, kv_heads, entries, dtype=torch.int32),
        "select_block_size": block,
        "select_block_count": entries,
    }
    return paged_arguments(batch=batch, tokens=tokens, kv_heads=kv_heads, **own | changes)


CALLS = Calls(nsa_select_attention_infer, arguments)
accepted, refused = CALLS.accepted, CALLS.refused


def operator(**changes) -> Any:
    parts = paged_parts() | {"topk_indices": torch.zeros(2, 2, 3, dtype=torch.int32), "select_block_size": 32}
    return torch.ops.nsa_triton.select_attention_infer(**parts | changes)


class TestPagedValidation(PagedValidation):
    calls = CALLS
    operator = staticmethod(operator)
    indices = ("topk_indices", "block_table")
    bad_number: ClassVar[dict[str, Any]] = {"select_block_size": 24}
    bad_parts: ClassVar[list[dict[str, Any]]] = [
        {"topk_indices": torch.zeros(2, 2, 3)},
        {"topk_indices": torch.zeros(2, 2, 3, dtype=torch.int64)},
        {"topk_indices": torch.zeros(2, 1, 2, 3, dtype=torch.int32)},
    ]

    def packed(self, tokens):
        return super().packed(tokens) | {"topk_indices": torch.zeros(tokens, 2, 3, dtype=torch.int32)}

    def own_sizes(self, rng):
        return {"block": rng.choice([16, 32, 16, 7]), "entries": rng.choice([1, 3])}


@pytest.mark.parametrize("argument", ["query", "key", "value", "topk_indices", "block_table", "atten_mask"])
@pytest.mark.parametrize("value", [None, 3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    if value is None and argument in ("block_table", "atten_mask"):
        accepted(**{argument: None})
    else:
        refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", ["query", "key", "value", "topk_indices", "block_table"])
def test_tensors_are_dense(argument):
    refused(ArgumentTypeError, argument, **{argument: arguments()[argument].to_sparse()})


INTEGERS = ["head_num", "key_value_head_num", "select_block_size", "select_block_count", "page_block_size"]


@pytest.mark.parametrize("argument", INTEGERS)
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=repr)
def test_integers_are_ints(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


def test_ids_have_a_list_for_each_query_token_and_kv_head():
    zeros, ints = torch.zeros, torch.int32
    shape: tuple[int, ...]
    for shape in ((), (3,), (2, 3), (2, 1, 2, 3, 1)):
        refused(ArgumentValueError, "topk_indices", topk_indices=zeros(shape, dtype=ints))
    refused(ArgumentValueError, "topk_indices", tokens=2, topk_indices=zeros(2, 2, 3, dtype=ints))
    query = zeros(2, 4, 16)
    refused(ArgumentValueError, "topk_indices", query=query, layout="TND", topk_indices=zeros(2, 1, 2, 3, dtype=ints))
    refused(ArgumentValueError, "topk_indices.shape[:2]", topk_indices=zeros(3, 1, 2, 3, dtype=ints))
    refused(ArgumentValueError, "topk_indices.shape[0]", topk_indices=zeros(3, 2, 3, dtype=ints))
    refused(ArgumentValueError, "topk_indices.shape[1]", topk_indices=zeros(2, 1, 4, 3, dtype=ints))
    refused(ArgumentValueError, "select_block_count", select_block_count=4)
    refused(ArgumentValueError, "select_block_count", entries=0)


# argument in messages; sizes that change together; legal and illegal values
LIMITS: list[Any] = [
    ("select_block_size", "block", [16, 48, 128, 256], [0, -16, 8, 24]),
    *PAGED_LIMITS,
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        accepted(**{name: value})
    for value in illegal:
        refused(ArgumentValueError, argument, **{name: value})


def test_documented_mode():
    cann: dict[str, Any] = {"key_dim": 192, "value_dim": 128, "page": 64, "block": 64, "dtype": torch.float16}
    with limits("documented"):
        accepted(**cann)
        accepted(**cann, heads=32, tokens=4)
        documented: Any = (
            ("query.dtype", {"dtype": torch.float32}),
            ("select_block_size", {"block": 144}),
            ("page_block_size", {"page": 48}),
            ("head_num / key_value_head_num (G)", {"heads": 34}),
            ("query head size (Dk)", {"key_dim": 128}),
            ("value head size (Dv)", {"value_dim": 64}),
            ("query tokens per batch (S)", {"tokens": 5}),
        )
        for argument, changes in documented:
            error = ArgumentTypeError if "dtype" in changes else ArgumentValueError
            assert "documented limit" in refused(error, argument, **cann | changes)
        packed: dict[str, Any] = {
            "query": torch.zeros(6, 4, 192).half(),
            "topk_indices": torch.zeros(6, 2, 3, dtype=torch.int32),
        }
        packed |= {"layout": "TND", "actual_seq_qlen": [5, 1]}
        refused(ArgumentValueError, "query tokens per batch (S)", **cann | packed)
    accepted(**cann, **packed)


# --- indices ---------------------------------------------------------------------------------------------------------


def ids(*entries):
    return torch.tensor(entries, dtype=torch.int32)


@pytest.mark.usefixtures("checking_indices")
def test_checked_indices_name_the_first_bad_entry():
    accepted()
    accepted(topk_indices=ids([[0, 1, -1], [-1, 1, 0]], [[1, 1, 1], [-1, -1, -1]]))  # 40 tokens are two blocks
    message = refused(
        ArgumentValueError, "topk_indices[1, 0, 2]", topk_indices=ids([[0, 1, 1], [0, 1, 0]], [[1, 1, 2], [-2, 0, 0]])
    )
    assert "from -1 to 1" in message
    refused(ArgumentValueError, "topk_indices[0, 1, 0]", topk_indices=ids([[0, 1, 1], [-2, 1, 0]], [[0] * 3] * 2))
    table = torch.tensor([[0, 8, -1, -1], [-1, 3, 99, 99]], dtype=torch.int32)
    first_blocks, second_blocks = ids(*[[[0] * 3] * 2] * 2), ids(*[[[1] * 3] * 2] * 2)
    assert "8 pages" in refused(ArgumentValueError, "block_table[1, 0]", block_table=table, topk_indices=first_blocks)
    refused(ArgumentValueError, "block_table[0, 1]", block_table=table, topk_indices=second_blocks)


@pytest.mark.usefixtures("checking_indices")
def test_only_what_is_read_is_checked():
    """A block of 48 tokens on pages of 32, cut at 70 tokens: block 1 is tokens 48 to 69, on pages 1 and 2."""
    sizes: dict[str, Any] = {"block": 48, "actual_seq_kvlen": [70, 70], "topk_indices": ids(*[[[1, -1, -1]] * 2] * 2)}
    for column in range(4):
        table = torch.arange(8, dtype=torch.int32).view(2, 4)
        table[1, column] = -1
        if column in (1, 2):
            refused(ArgumentValueError, f"block_table[1, {column}]", **sizes, block_table=table)
        else:
            accepted(**sizes, block_table=table)
    garbage = torch.full((2, 2, 2, 3), 99, dtype=torch.int32)
    garbage[:, 0] = 0
    accepted(tokens=2, actual_seq_qlen=[1, 1], topk_indices=garbage)  # the second rows are no query tokens
    accepted(actual_seq_kvlen=[0, 0], topk_indices=garbage[:, :1])


def test_indices_are_not_checked_by_default():
    accepted(topk_indices=ids(*[[[99, -7, 0]] * 2] * 2), block_table=torch.full((2, 4), 99, dtype=torch.int32))
