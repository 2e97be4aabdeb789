"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from nsa_triton import (
    ArgumentTypeError,
    ArgumentValueError,
    NsaError,
    limits,
    npu_nsa_compress_attention,
    nsa_compress_attention,
    nsa_compress_attention_grad,
)

TOKENS, KEYS = 40, 20
QLEN, CMP_LEN, SEL_LEN = "actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"


def sized(
    heads=4, kv_heads=2, key_dim=8, value_dim=6, window=32, stride=16, block=64, entries=4, dtype=torch.float32,
    **changes,
) -> dict[str, Any]:  # fmt: skip
    """A call on the reference implementation whose tensors fit its numbers, with some arguments changed."""
    call = {
        "query": torch.zeros(TOKENS, heads, key_dim, dtype=dtype),
        "key": torch.zeros(KEYS, kv_heads, key_dim, dtype=dtype),
        "value": torch.zeros(KEYS, kv_heads, value_dim, dtype=dtype),
        "scale_value": 0.5,
        "head_num": heads,
        "compress_block_size": window,
        "compress_stride": stride,
        "select_block_size": block,
        "select_block_count": entries,
        QLEN: [10, TOKENS],
        CMP_LEN: [KEYS - 16, KEYS],
        "impl": "reference",
    }
    return call | changes


def sized_grad(**changes) -> dict[str, Any]:
    """The same for the gradient."""
    call = sized(**changes)
    fitting = sized(**{name: value for name, value in changes.items() if name not in ("query", "key", "value")})
    shape = (*fitting["query"].shape[:2], fitting["value"].shape[2])
    for name in ("select_block_size", "select_block_count"):
        del call[name]
    like = fitting["query"].dtype
    made = {
        "grad": torch.zeros(shape, dtype=like),
        "attention_out": torch.zeros(shape, dtype=like),
        "softmax_max": torch.zeros(*shape[:2], 8),
        "softmax_sum": torch.ones(*shape[:2], 8),
    }
    return made | call


def works(**changes):
    return nsa_compress_attention(**sized(**changes))


def refusal(error, argument, function, call) -> str:
    with pytest.raises(error) as caught:
        function(**call)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected "), caught.value
    assert ", got " in str(caught.value)
    return str(caught.value)


def refused(error, argument, **changes) -> str:
    """By both functions, if both have such arguments."""
    message = refusal(error, argument, nsa_compress_attention, sized(**changes))
    if not set(changes) & {"topk_mask", SEL_LEN, "select_block_size", "select_block_count", "num_init_blocks",
                           "num_local_blocks", "importance", "block", "entries"}:  # fmt: skip
        refusal(error, argument, nsa_compress_attention_grad, sized_grad(**changes))
    return message


def test_the_legal_calls_are_legal():
    outputs = works()
    assert [tuple(output.shape) for output in outputs] == [(40, 4, 6), (40, 2, 4), (40, 4, 8), (40, 4, 8)]
    gradients = nsa_compress_attention_grad(**sized_grad())
    assert [tuple(gradient.shape) for gradient in gradients] == [(40, 4, 8), (20, 2, 8), (20, 2, 6)]
    assert npu_nsa_compress_attention is nsa_compress_attention


@pytest.mark.parametrize("argument", ["query", "key", "value", "atten_mask", "topk_mask"])
@pytest.mark.parametrize("value", [3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})
    refused(ArgumentTypeError, argument, **{argument: torch.zeros(2, 2).to_sparse()})


@pytest.mark.parametrize("argument", ["grad", "attention_out", "softmax_max", "softmax_sum"])
@pytest.mark.parametrize("value", [None, 3, np.zeros((2, 2))], ids=lambda v: type(v).__name__)
def test_tensors_of_the_gradient_are_tensors(argument, value):
    refusal(ArgumentTypeError, argument, nsa_compress_attention_grad, sized_grad() | {argument: value})


@pytest.mark.parametrize("argument", ["query", "key", "value"])
def test_tensors_are_required(argument):
    refused(ArgumentTypeError, argument, **{argument: None})


INTEGERS = [
    "head_num",
    "compress_block_size",
    "compress_stride",
    "select_block_size",
    "select_block_count",
    "num_init_blocks",
    "num_local_blocks",
]


@pytest.mark.parametrize("argument", INTEGERS)
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=repr)
def test_integers_are_ints(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", INTEGERS)
def test_huge_and_negative_integers_are_named(argument):
    for value in (2**80, -16):
        refused(ArgumentValueError, argument, **{argument: value})


def test_scale():
    for real in (1, 0.5, -2.0, 0, np.float32(0.5), np.float64(1e-3), np.int64(2)):
        works(scale_value=real)
    for other in (None, "1", True, 1j, torch.tensor(1.0), [1.0]):
        refused(ArgumentTypeError, "scale_value", scale_value=other)
    for value in (float("nan"), float("inf"), -float("inf"), np.float32("inf"), 10**400):
        refused(ArgumentValueError, "scale_value", scale_value=value)


@pytest.mark.parametrize(("argument", "known"), [("importance", "cann, overlap"), ("impl", "auto, triton, reference")])
def test_words(argument, known):
    for value in ("", "Cann", "exact"):
        assert known in refused(ArgumentValueError, argument, **{argument: value})
    for other in (None, 3, ["cann"]):
        refused(ArgumentTypeError, argument, **{argument: other})


def test_causal_is_a_bool():
    for other in (None, 1, 0, "True", torch.tensor(True), np.bool_(True)):
        refused(ArgumentTypeError, "causal", causal=other)


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert works(dtype=dtype)[0].dtype == dtype
        assert {gradient.dtype for gradient in nsa_compress_attention_grad(**sized_grad(dtype=dtype))} == {dtype}
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        refused(ArgumentTypeError, "query.dtype", dtype=dtype)
    for name in ("key", "value"):
        assert "torch.float16" in refused(ArgumentTypeError, f"{name}.dtype", **{name: sized()[name].half()})
    for name in ("grad", "attention_out"):
        changed = {name: sized_grad()[name].half()}
        refusal(ArgumentTypeError, f"{name}.dtype", nsa_compress_attention_grad, sized_grad() | changed)
    for name in ("softmax_max", "softmax_sum"):
        for dtype in (torch.float64, torch.bfloat16):
            changed = {name: sized_grad()[name].to(dtype)}
            refusal(ArgumentTypeError, f"{name}.dtype", nsa_compress_attention_grad, sized_grad() | changed)


def test_triton_does_not_compute_in_float64():
    message = refused(ArgumentTypeError, "query.dtype", dtype=torch.float64, impl="triton")
    assert "reference" in message


@pytest.mark.parametrize("argument", ["key", "value"])
def test_devices_agree(argument):
    assert "meta" in refused(ArgumentValueError, f"{argument}.device", **{argument: sized()[argument].to("meta")})


@pytest.mark.parametrize("argument", ["grad", "attention_out", "softmax_max", "softmax_sum"])
def test_what_belongs_to_the_forward_call_fits(argument):
    call = sized_grad()
    for change, name in (
        (call[argument].to("meta"), f"{argument}.device"),
        (call[argument][0], argument),
        (call[argument][1:], f"{argument}.shape"),
        (call[argument][:, 1:], f"{argument}.shape"),
        (call[argument][..., 1:], f"{argument}.shape"),
    ):
        refusal(ArgumentValueError, name, nsa_compress_attention_grad, call | {argument: change})


@pytest.mark.parametrize("argument", ["query", "key", "value"])
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (1, 2, 3, 4)], ids=str)
def test_ranks(argument, shape):
    refused(ArgumentValueError, argument, **{argument: torch.zeros(shape)})


def test_sizes_agree():
    call = sized()
    refused(ArgumentValueError, "head_num", head_num=8)
    refused(ArgumentValueError, "value.shape[0]", value=call["value"][1:])
    refused(ArgumentValueError, "value.shape[1]", value=call["value"][:, :1])
    refused(ArgumentValueError, "key.shape[2]", key=call["key"][..., :7])
    refused(ArgumentValueError, "key.shape[1] (N2)", kv_heads=0)
    refused(ArgumentValueError, "query.shape[1] (N1)", heads=0)


LIMITS = [
    ("compress_block_size", "window", [16, 48, 128], [0, 8, 24]),
    ("compress_stride", "stride", [16, 32], [0, 8, 48]),
    ("select_block_size", "block", [32, 48, 160], [0, 16, 40]),
    ("select_block_count", "entries", [1, 2, 5000], [0, -1]),
    ("num_init_blocks", "num_init_blocks", [0, 1, 99], [-1]),
    ("num_local_blocks", "num_local_blocks", [0, 1, 99], [-1]),
    ("head_num", "heads", [2, 4, 128], [1, 3]),
    ("query.shape[2] (Dk)", "key_dim", [1, 3, 200], [0]),
    ("value.shape[2] (Dv)", "value_dim", [1, 9, 200], [0]),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    fitting = {"window": {"block": 128}, "stride": {"block": 64}}.get(name, {})
    for value in legal:
        works(**fitting, **{name: value})
    for value in illegal:
        refused(ArgumentValueError, argument, **fitting, **{name: value})


# Legal in every way; not documented.
DOCUMENTED: list[tuple[str, dict[str, Any]]] = [
    ("compress_block_size", {"window": 144, "block": 144}),
    ("compress_stride", {"window": 80, "stride": 80, "block": 80}),
    ("select_block_size", {"block": 144}),
    ("select_block_count", {"entries": 33, CMP_LEN: [0, KEYS]}),
    ("fewest blocks of a segment", {"entries": 2}),
    ("head_num / key.shape[1] (G)", {"heads": 128, "kv_heads": 1}),
    ("128 % G", {"heads": 6}),
    ("query.shape[2] (Dk)", {"key_dim": 769}),
    ("value.shape[2] (Dv)", {"key_dim": 6, "value_dim": 7}),
]


@pytest.mark.parametrize(("argument", "changes"), DOCUMENTED, ids=[row[0] for row in DOCUMENTED])
def test_documented_limits(argument, changes):
    legal = {"dtype": torch.float16, "entries": 1, SEL_LEN: [1, 5]}
    works(**legal | changes)
    with limits("documented"):
        works(**legal)
        call = sized(**legal | changes)
        message = refusal(ArgumentValueError, argument, nsa_compress_attention, call)
        assert "documented limit of CANN" in message
        refused(ArgumentTypeError, "query.dtype", **legal | {"dtype": torch.float32})


def test_documented_lengths():
    """Lists that CANN asks for, of as many segments and tokens as it takes."""
    legal = {"dtype": torch.float16, "entries": 1}
    with limits("documented"):
        works(**legal, **{SEL_LEN: [1, 5]})
        assert "documented" in refusal(ArgumentTypeError, SEL_LEN, nsa_compress_attention, sized(**legal))
        short = sized(**legal, **{SEL_LEN: [5]})
        assert "documented" in refusal(ArgumentValueError, SEL_LEN, nsa_compress_attention, short)
        many = {QLEN: [0] * 4097, CMP_LEN: [KEYS] * 4097, "dtype": torch.float16}
        refusal(ArgumentValueError, "len(actual_seq_qlen) (B)", nsa_compress_attention_grad, sized_grad(**many))
        key = torch.zeros(14001, 2, 8, dtype=torch.float16)
        long = {"key": key, "value": key, "key_dim": 8, "value_dim": 8, "dtype": torch.float16, CMP_LEN: [0, 14001]}
        refusal(ArgumentValueError, "longest segment of keys", nsa_compress_attention_grad, sized_grad(**long))
        nsa_compress_attention_grad(**sized_grad(**long | {CMP_LEN: [1, 14001]}))


# --- lengths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [QLEN, CMP_LEN, SEL_LEN])
@pytest.mark.parametrize(
    "lengths",
    [1, 1.0, "1", {1}, [1.0, 1], [1, True], ["1", 1], [[1], [1]], np.array([1.0, 1.0]), torch.tensor([1.0, 1.0])],
    ids=repr,
)
def test_lengths_of_a_wrong_type(argument, lengths):
    refused(ArgumentTypeError, argument, **{argument: lengths})


@pytest.mark.parametrize("argument", [QLEN, CMP_LEN])
def test_lengths_are_required(argument):
    assert "required" in refused(ArgumentTypeError, argument, **{argument: None})


@pytest.mark.parametrize(
    "lengths", [[], [-1, 20], [20, 19], [20, 10, 20], np.array([[10, 20]]), torch.tensor(20)], ids=repr
)
@pytest.mark.parametrize("argument", [QLEN, CMP_LEN])
def test_lengths_of_a_wrong_value(argument, lengths):
    refused(ArgumentValueError, argument, **{argument: lengths})


def test_lengths_end_at_the_last_token_or_before():
    for argument, tokens in ((QLEN, TOKENS), (CMP_LEN, KEYS)):
        works(**{argument: [3, tokens - 1]})
        message = refused(ArgumentValueError, f"{argument}[-1]", **{argument: [3, tokens + 1]})
        assert f"= {tokens}" in message
        refused(ArgumentValueError, f"{argument}[-1]", **{argument: [3, 2**80]})


def test_as_many_segments_of_keys_as_of_queries():
    assert "2 entries" in refused(ArgumentValueError, CMP_LEN, **{CMP_LEN: [KEYS]})
    refused(ArgumentValueError, CMP_LEN, **{QLEN: [TOKENS]})


def test_empty_segments_anywhere():
    for lengths in ([0, 0, 10], [10, 10, 10], [0, 10, 40], [0, 0, 0]):
        works(**{QLEN: lengths, CMP_LEN: [0, 5, 20]})
        works(**{QLEN: [0, 5, 20], CMP_LEN: [min(end, KEYS) for end in lengths]})


@pytest.mark.parametrize(
    "lengths",
    [
        (4, 20),
        np.array([4, 20]),
        np.array([4, 20], dtype=np.uint8),
        [np.int32(4), 20],
        torch.tensor([4, 20]),
        torch.tensor([4, 20], dtype=torch.int16),
        torch.tensor([4, 0, 20, 0])[::2],
    ],
    ids=repr,
)
def test_every_kind_of_length_list_means_the_same(lengths):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator) for shape in ((TOKENS, 4, 8), (KEYS, 2, 8), (KEYS, 2, 6))
    )
    tensors = {"query": query, "key": key, "value": value}
    for argument in (QLEN, CMP_LEN):
        found = (works(**tensors, **{argument: given}) for given in (lengths, [4, 20]))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_device_tensor_of_lengths_is_refused_with_a_reason():
    message = refused(ArgumentValueError, QLEN, **{QLEN: torch.tensor([10, 40], device="meta")})
    assert "tolist" in message


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("argument", "columns"), [("atten_mask", 16), ("topk_mask", 4)])
def test_masks(argument, columns):
    """As large as the longest segment of queries, 30 tokens, and that of keys, 16 compressed tokens on 4 blocks."""
    for dtype in (torch.bool, torch.uint8):
        works(**{argument: torch.zeros(30, columns, dtype=dtype)})
        works(**{argument: torch.ones(99, 99, dtype=dtype)})
    for dtype in (torch.int8, torch.float32, torch.int64):
        refused(ArgumentTypeError, f"{argument}.dtype", **{argument: torch.zeros(30, columns, dtype=dtype)})
    for rank in ((), (30,), (1, 30, columns)):
        refused(ArgumentValueError, argument, **{argument: torch.zeros(rank, dtype=torch.bool)})
    short = refused(ArgumentValueError, f"{argument}.shape[0]", **{argument: torch.zeros(29, columns).bool()})
    assert "at least 30" in short
    narrow = refused(ArgumentValueError, f"{argument}.shape[1]", **{argument: torch.zeros(30, columns - 1).bool()})
    assert f"at least {columns}" in narrow
    refused(ArgumentValueError, f"{argument}.device", **{argument: torch.zeros(30, columns, device="meta").bool()})


def test_masks_and_what_stands_for_them_exclude_one_another():
    atten_mask, topk_mask = torch.zeros(30, 16).bool(), torch.zeros(30, 4).bool()
    assert "atten_mask" in refused(ArgumentValueError, "causal", causal=True, atten_mask=atten_mask)
    for name in ("num_init_blocks", "num_local_blocks"):
        assert "topk_mask" in refused(ArgumentValueError, name, topk_mask=topk_mask, **{name: 1})
    works(causal=True, topk_mask=topk_mask)
    works(atten_mask=atten_mask, num_init_blocks=1, num_local_blocks=1)
    works(atten_mask=atten_mask, topk_mask=topk_mask)


# --- the registered operators ----------------------------------------------------------------------------------------


def operator(**changes):
    call = {
        **{name: sized()[name] for name in ("query", "key", "value")},
        "atten_mask": None,
        "topk_mask": None,
        "query_ends": [10, TOKENS],
        "key_ends": [4, KEYS],
        "scale": 0.5,
        "compress_block_size": 32,
        "compress_stride": 16,
        "select_block_size": 64,
        "select_block_count": 4,
        "causal": False,
        "num_init_blocks": 0,
        "num_local_blocks": 0,
        "importance": "cann",
        "impl": "reference",
    }
    return torch.ops.nsa_triton.compress_attention(**call | changes)


def operator_grad(**changes):
    given = sized_grad()
    names = ("grad", "query", "key", "value", "attention_out", "softmax_max", "softmax_sum")
    call = {
        **{name: given[name] for name in names},
        "atten_mask": None,
        "query_ends": [10, TOKENS],
        "key_ends": [4, KEYS],
        "scale": 0.5,
        "compress_block_size": 32,
        "compress_stride": 16,
        "causal": False,
        "impl": "reference",
    }
    return torch.ops.nsa_triton.compress_attention_grad(**call | changes)


BAD: list[tuple[str, dict[str, Any], bool]] = [  # argument, changes, whether the gradient has it too
    (QLEN, {"query_ends": [11, 10]}, True),
    (f"{QLEN}[-1]", {"query_ends": [11, TOKENS + 1]}, True),
    (f"{CMP_LEN}[-1]", {"key_ends": [11, KEYS + 1]}, True),
    (CMP_LEN, {"key_ends": [KEYS]}, True),
    ("value.shape[0]", {"value": torch.zeros(KEYS - 1, 2, 6)}, True),
    ("head_num", {"query": torch.zeros(TOKENS, 3, 8)}, True),
    ("key.shape[2]", {"key": torch.zeros(KEYS, 2, 7)}, True),
    ("compress_stride", {"compress_stride": 48}, True),
    ("atten_mask.shape[1]", {"atten_mask": torch.zeros(30, 15).bool()}, True),
    ("causal", {"atten_mask": torch.zeros(30, 16).bool(), "causal": True}, True),
    ("impl", {"impl": "fast"}, True),
    ("topk_mask.shape[0]", {"topk_mask": torch.zeros(29, 4).bool()}, False),
    ("num_init_blocks", {"num_init_blocks": -1}, False),
    ("num_local_blocks", {"num_local_blocks": 1, "topk_mask": torch.zeros(30, 4).bool()}, False),
    ("select_block_size", {"select_block_size": 72}, False),
    ("select_block_count", {"select_block_count": 0}, False),
    ("importance", {"importance": "exact"}, False),
]


@pytest.mark.parametrize(("argument", "changes", "in_both"), BAD, ids=[row[0] for row in BAD])
def test_registered_operators_check_by_themselves(argument, changes, in_both):
    """torch.ops and compiled graphs do not come through the checks of the public functions."""
    operator()
    operator_grad()
    for function in (operator, operator_grad)[: 1 + in_both]:
        refusal(ArgumentValueError, argument, function, changes)
    with pytest.raises(ArgumentTypeError, match="softmax_max"):
        operator_grad(softmax_max=torch.zeros(TOKENS, 4, 8).double())


# --- garbage ---------------------------------------------------------------------------------------------------------

GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_call(rng, make) -> dict[str, Any]:
    window = {
        "window": rng.choice([32, 32, 32, 32, 48, 48, 16, 7]),
        "stride": rng.choice([16, 16, 16, 16, 16, 16, 32, 0]),
        "heads": rng.choice([2, 4, 4, 4, 14, 3]),
        "kv_heads": rng.choice([1, 2, 2, 2]),
    }
    call: dict[str, Any] = make(**window)
    ends = sorted(rng.choice([0, 1, 16, 17, 39, 40, 40]) for _ in range(3))
    call |= {QLEN: ends, CMP_LEN: [min(end, KEYS) for end in ends]}
    if rng.random() < 0.1:
        call[rng.choice([QLEN, CMP_LEN])] = [rng.choice([0, 20, 40, 41]) for _ in range(rng.choice([2, 3, 3]))]
    if "select_block_size" in call:
        call["select_block_size"] = rng.choice([48, 64, 64, 64, 96, 96, 5])
        call["num_init_blocks"] = rng.choice([0, 0, 0, 1])
        if rng.random() < 0.3:
            call["topk_mask"] = torch.zeros(rng.choice([30, 40]), rng.choice([9, 20]), dtype=torch.uint8)
    if rng.random() < 0.3:
        call["atten_mask"] = torch.zeros(rng.choice([39, 40]), rng.choice([19, 20]), dtype=torch.bool)
    call["causal"] = rng.random() < 0.3
    while rng.random() < 0.2:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call | {"impl": "reference"}


def succeeds(function, call) -> bool:
    """Whether a call returns; if it raises, then one of the errors of this package, with all its parts."""
    try:
        function(**call)
    except NsaError as error:
        return ": expected " not in str(error)
    return True


@pytest.mark.parametrize(
    ("function", "make"), [(nsa_compress_attention, sized), (nsa_compress_attention_grad, sized_grad)]
)
def test_random_and_garbage_calls_work_or_raise_a_named_error(function, make):
    rng = random.Random(20)
    assert 100 < sum(succeeds(function, random_call(rng, make)) for _ in range(500)) < 450
