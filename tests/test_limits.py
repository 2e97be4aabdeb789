"""The table of limits: its two columns, how the mode is chosen, and what its rows say."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from nsa_triton import ArgumentTypeError, ArgumentValueError, ConfigError, limits, nsa_compress
from nsa_triton.limits import LIMITS, Dtype, Equal, Limit, OneOf, check, mode_in_force, rows

LEGAL: dict[str, dict[Any, Any]] = {
    "nsa_gated_combine": {"dtype": torch.float16, "N1": 8, "Dv": 128},
    "nsa_compress": {
        "dtype": torch.float16,
        "compress_block_size": 32,
        "compress_stride": 16,
        "T": 100,
        "N": 4,
        "D": 128,
        "weight.shape[0]": 32,
        "weight.shape[1]": 4,
        "actual_seq_len[-1]": 100,
    },
    "nsa_compress_infer": {
        "dtype": torch.float16,
        "compress_block_size": 32,
        "compress_stride": 16,
        "page_block_size": 64,
        "B": 3,
        "N": 4,
        "D": 128,
        "new_tokens": 1,
        "weight.shape[0]": 32,
        "weight.shape[1]": 4,
        "cache.shape[1]": 4,
        "cache.shape[2]": 128,
    },
    "nsa_compress_attention": {
        "dtype": torch.float16,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 16,
        "fewest blocks": 20,
        "num_init_blocks": 1,
        "num_local_blocks": 2,
        "query heads": 8,
        "N1": 8,
        "N2": 2,
        "value heads": 2,
        "head_num": 8,
        "G": 4,
        "128 % G": 0,
        "key head size": 192,
        "B": 3,
        "T1": 100,
        "T2": 50,
        "actual_seq_qlen[-1]": 90,
        "actual_cmp_seq_kvlen[-1]": 50,
        "Dk": 192,
        "Dv": 128,
        "S2": 30,
    },
    "nsa_compress_attention_infer": {
        "dtype": torch.float16,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 16,
        "page_block_size": 64,
        "query heads": 8,
        "key heads": 2,
        "N1": 8,
        "N2": 2,
        "value heads": 2,
        "head_num": 8,
        "G": 4,
        "key head size": 192,
        "128 % G": 0,
        "Dk": 192,
        "Dv": 128,
        "S": 1,
    },
    "nsa_select_attention": {
        "dtype": torch.float16,
        "select_block_size": 64,
        "select_block_count": 16,
        "topk_indices.shape[2]": 16,
        "T1": 300,
        "T2": 2048,
        "query heads": 8,
        "N1": 8,
        "N2": 2,
        "value heads": 2,
        "head_num": 8,
        "G": 4,
        "key head size": 192,
        "B": 2,
        "actual_seq_qlen[-1]": 300,
        "actual_seq_kvlen[-1]": 2048,
        "Dk": 192,
        "Dv": 128,
        "S1": 200,
        "S2": 1024,
        "least S2": 1024,
        "K * select_block_size": 1024,
        "S2 % select_block_size": 0,
    },
    "nsa_select_attention_infer": {
        "dtype": torch.float16,
        "select_block_size": 64,
        "select_block_count": 16,
        "topk_indices.shape[-1]": 16,
        "page_block_size": 64,
        "query heads": 8,
        "key heads": 2,
        "N1": 8,
        "N2": 2,
        "value heads": 2,
        "head_num": 8,
        "G": 4,
        "key head size": 192,
        "B": 3,
        "key_value_head_num": 2,
        "Dk": 192,
        "Dv": 128,
        "S": 1,
    },
    "nsa_sliding_window_attention": {
        "dtype": torch.float16,
        "window_size": 512,
        "T1": 300,
        "T2": 2048,
        "query heads": 8,
        "N1": 8,
        "N2": 2,
        "value heads": 2,
        "head_num": 8,
        "G": 4,
        "key head size": 192,
        "B": 2,
        "actual_seq_qlen[-1]": 300,
        "actual_seq_kvlen[-1]": 2048,
        "Dk": 192,
        "Dv": 128,
    },
    "nsa_sliding_window_attention_infer": {
        "dtype": torch.float16,
        "window_size": 512,
        "page_block_size": 64,
        "query heads": 8,
        "key heads": 2,
        "N1": 8,
        "N2": 2,
        "value heads": 2,
        "head_num": 8,
        "G": 4,
        "key head size": 192,
        "B": 3,
        "key_value_head_num": 2,
        "Dk": 192,
        "Dv": 128,
        "S": 1,
    },
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("NSA_TRITON_LIMITS", raising=False)


def beyond(limit: Limit, mode: str) -> list[object]:
    """Values just outside of one row, when everything else is legal."""
    rule = getattr(limit, mode)
    if isinstance(rule, Dtype):
        return [dtype for dtype in (torch.int32, torch.float32, torch.float64) if dtype not in rule.choices]
    given = LEGAL[limit.op]
    if isinstance(rule, OneOf):
        return [min(rule.choices) - 16, max(rule.choices) + 16, max(rule.choices) - 1]
    if isinstance(rule, Equal):
        other = given.get(rule.other, rule.other)
        return [other - 1, other + 1]
    step = given.get(rule.multiple_of, rule.multiple_of)
    low, high = (given.get(bound, bound) for bound in (rule.minimum, rule.maximum))
    return [low - step, *([high + step] if high is not None else []), *([low + 1] if step > 1 else [])]


@pytest.mark.parametrize("mode", ["structural", "documented"])
@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: f"{limit.op}-{limit.quantity}")
def test_each_row_refuses_what_lies_beyond_it(limit, mode):
    check(limit.op, LEGAL[limit.op], mode)
    outside = beyond(limit, mode)
    assert outside
    for value in outside:
        with pytest.raises((ArgumentTypeError, ArgumentValueError)) as caught:
            limit.check(LEGAL[limit.op] | {limit.quantity: value}, mode)
        assert caught.value.argument == limit.argument
        assert str(value) in str(caught.value)
        by_structure = limit.structural.accepts(value, LEGAL[limit.op] | {limit.quantity: value})
        assert ("documented limit of CANN" in str(caught.value)) == by_structure


@pytest.mark.parametrize(("low", "high", "name"), [(16, 128, "compress_block_size"), (1, 128, "N"), (16, 256, "D")])
def test_each_range_includes_its_bounds(low, high, name):
    (limit,) = (limit for limit in rows("nsa_compress") if limit.quantity == name)
    for value in (low, high):
        limit.check({name: value}, "structural")


def test_documented_limits_are_never_looser():
    """Whatever CANN's documents allow, this package allows too: in that mode a call must obey both columns."""
    for limit in LIMITS:
        given = LEGAL[limit.op]
        for value in beyond(limit, "structural"):
            with pytest.raises((ArgumentTypeError, ArgumentValueError)):
                limit.check(given | {limit.quantity: value}, "documented")


def test_rows_read_well():
    texts = {limit.argument: limit.structural.text() for limit in rows("nsa_compress")}
    assert texts["compress_stride"] == "a multiple of 16 from 16 to compress_block_size"
    assert texts["input.shape[1] (N)"] == "an integer from 1 to 128"
    assert texts["weight.shape[1]"] == "equal to N"
    assert texts["input.dtype"] == "float16, bfloat16, float32 or float64"
    assert rows("no_such_op") == ()


def test_structural_is_the_default():
    assert mode_in_force() == "structural"


def test_the_environment_chooses_and_the_context_overrides(monkeypatch):
    monkeypatch.setenv("NSA_TRITON_LIMITS", "documented")
    assert mode_in_force() == "documented"
    with limits("structural"):
        assert mode_in_force() == "structural"
    assert mode_in_force() == "documented"
    monkeypatch.setenv("NSA_TRITON_LIMITS", "strict")
    with pytest.raises(ConfigError):
        mode_in_force()


def test_contexts_nest_and_end_when_an_error_leaves_them():
    with limits("documented"):
        with pytest.raises(ArgumentValueError), limits("structural"):
            limits("strict").__enter__()
        assert mode_in_force() == "documented"
    assert mode_in_force() == "structural"


def test_the_context_is_of_this_thread():
    seen = []
    with limits("documented"):
        thread = threading.Thread(target=lambda: seen.append(mode_in_force()))
        thread.start()
        thread.join()
    assert seen == ["structural"]


def test_an_unknown_mode_lists_the_known_ones():
    with pytest.raises(ArgumentValueError, match="structural, documented"), limits("strict"):
        pass


def test_nsa_compress_obeys_the_mode():
    def call(dtype):
        tensors = torch.zeros(64, 1, 16, dtype=dtype), torch.zeros(32, 1, dtype=dtype)
        return nsa_compress(*tensors, 32, 16, actual_seq_len=[64], impl="reference")

    call(torch.float32)
    with limits("documented"):
        call(torch.bfloat16)
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(ArgumentTypeError, match="documented limit of CANN"):
                call(dtype)
    call(torch.float32)
