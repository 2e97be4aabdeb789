"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError, NsaError
from nsa_triton.limits import limits
from nsa_triton.ops.sliding_window_attention_infer import nsa_sliding_window_attention_infer


def arguments(
    *,
    batch=2,
    tokens=1,
    heads=4,
    kv_heads=2,
    key_dim=16,
    value_dim=8,
    page=32,
    window=20,
    dtype=torch.float32,
    **changes,
) -> dict[str, Any]:
    """A legal call on the reference implementation: BSND, 4 pages for each batch; `changes` replace arguments."""
    n_pages = 4 * max(batch, 1)
    legal = {
        "query": torch.zeros(batch, tokens, heads, key_dim, dtype=dtype),
        "key": torch.zeros(n_pages, page, kv_heads, key_dim, dtype=dtype),
        "value": torch.zeros(n_pages, page, kv_heads, value_dim, dtype=dtype),
        "scale_value": 0.5,
        "head_num": heads,
        "key_value_head_num": kv_heads,
        "window_size": window,
        "page_block_size": page,
        "block_table": torch.arange(4 * batch, dtype=torch.int32).view(batch, 4),
        "actual_seq_kvlen": [40] * batch,
        "impl": "reference",
    }
    return legal | changes


def refused(error, argument, **changes):
    with pytest.raises(error) as caught:
        nsa_sliding_window_attention_infer(**arguments(**changes))
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected "), caught.value
    assert ", got " in str(caught.value)
    return str(caught.value)


def accepted(**changes) -> Any:
    return nsa_sliding_window_attention_infer(**arguments(**changes))


def test_the_legal_call_is_legal():
    assert accepted().shape == (2, 1, 4, 8)


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


def test_scales_are_finite_real_numbers():
    value: Any
    for value in (None, "1", True, 1j, torch.tensor(1.0), [1.0], np.bool_(True)):
        refused(ArgumentTypeError, "scale_value", scale_value=value)
    for value in (float("nan"), float("inf"), -float("inf"), 10**400, np.float32("inf")):
        refused(ArgumentValueError, "scale_value", scale_value=value)
    for value in (0, -1, 1e-30, np.float32(0.5), np.float64(0.5), np.int32(2)):
        accepted(scale_value=value)


def test_words():
    for value in ("TNH", "bsnd", ""):
        assert "BSH, BSND, TND" in refused(ArgumentValueError, "layout", layout=value)
    refused(ArgumentTypeError, "layout", layout=None)
    for value in ("cuda", ""):
        assert "auto, triton, reference" in refused(ArgumentValueError, "impl", impl=value)
    refused(ArgumentTypeError, "impl", impl=None)
    for flag in (None, 1, "yes"):
        refused(ArgumentTypeError, "return_lse", return_lse=flag)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.int64])
def test_dtypes_that_no_one_computes_in(dtype):
    refused(ArgumentTypeError, "query.dtype", dtype=dtype)


def test_tensors_agree():
    for name in ("key", "value"):
        assert "float32" in refused(ArgumentTypeError, f"{name}.dtype", **{name: arguments()[name].half()})
    for name in ("key", "value", "block_table"):
        assert "meta" in refused(ArgumentValueError, f"{name}.device", **{name: arguments()[name].to("meta")})
    for dtype in (torch.float32, torch.bool):
        refused(ArgumentTypeError, "block_table.dtype", block_table=arguments()["block_table"].to(dtype))


def test_triton_does_not_compute_in_float64():
    with pytest.raises(ArgumentTypeError, match=r"query\.dtype.*reference"):
        accepted(dtype=torch.float64, impl="triton")


def test_ranks():
    zeros: Any = torch.zeros
    shape: tuple[int, ...]
    for shape in ((), (8,), (2, 4, 16), (2, 1, 4, 16, 1)):
        refused(ArgumentValueError, "query", query=zeros(shape))
    for shape in ((), (2, 4, 16, 1), (2, 4)):
        refused(ArgumentValueError, "query", query=zeros(shape), layout="TND")
    for shape in ((), (2, 1, 4, 16), (2, 4)):
        refused(ArgumentValueError, "query", query=zeros(shape), layout="BSH")
    for name in ("key", "value"):
        for shape in ((), (8, 32), (8, 32, 2, 16, 1)):
            refused(ArgumentValueError, name, **{name: zeros(shape)})
    for shape in ((), (8,), (2, 4, 1)):
        refused(ArgumentValueError, "block_table", block_table=zeros(shape, dtype=torch.int32))


def test_shapes_agree():
    zeros, ints = torch.zeros, torch.int32
    refused(ArgumentValueError, "value.shape[0]", value=zeros(7, 32, 2, 8))
    refused(ArgumentValueError, "key.shape[1]", key=zeros(8, 48, 2, 16))
    refused(ArgumentValueError, "value.shape[1]", value=zeros(8, 48, 2, 8))
    refused(ArgumentValueError, "key.shape[1]", page_block_size=64)
    refused(ArgumentValueError, "key.shape[0]", key=zeros(0, 32, 2, 16), value=zeros(0, 32, 2, 8))
    refused(ArgumentValueError, "block_table.shape[0]", block_table=zeros(3, 4, dtype=ints))
    refused(ArgumentValueError, "block_table.shape[1]", block_table=zeros(2, 0, dtype=ints), actual_seq_kvlen=[0, 0])
    refused(ArgumentValueError, "query.shape[2]", query=zeros(2, 1, 63), layout="BSH")
    refused(ArgumentValueError, "key.shape[2]", key=zeros(8, 32, 33))
    refused(ArgumentValueError, "value.shape[2]", value=zeros(8, 32, 17))


def test_caches_are_dense_in_their_last_dimension_only():
    refused(ArgumentValueError, "key.stride(-1)", key=torch.zeros(8, 32, 16, 2).mT)
    refused(ArgumentValueError, "value.stride(-1)", value=torch.zeros(8, 32, 2, 16)[..., ::2])
    refused(ArgumentValueError, "value.stride(-1)", value=torch.zeros(8, 32, 32)[..., ::2])
    accepted(key=torch.zeros(8, 2, 32, 16).transpose(1, 2), value=torch.zeros(8, 32, 4, 24)[:, :, ::2, 3:11])
    accepted(value=torch.zeros(8, 32, 2, 2)[..., ::2])  # a head of one column


# argument in messages; sizes that change together; legal and illegal values
LIMITS: list[Any] = [
    ("window_size", "window", [1, 15, 16, 512, 2**31 - 1], [0, -1, 2**31, 2**70]),
    ("page_block_size", "page", [16, 48, 64, 256], [0, 8, 24]),
    ("query head size (Dk)", "key_dim", [1, 7, 192, 300], [0]),
    ("value head size (Dv)", "value_dim", [1, 7, 128, 300], [0]),
    ("query tokens per batch (S)", "tokens", [1, 4, 9], [0]),
    ("batches (B)", "batch", [1, 5], [0]),
    ("key_value_head_num", "kv_heads", [1, 4], [0]),
    ("head_num", "heads", [2, 6, 64], [0, 1, 5]),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    for value in legal:
        accepted(**{name: value})
    for value in illegal:
        refused(ArgumentValueError, argument, **{name: value})


def test_numbers_of_heads_are_those_of_the_tensors():
    for value in (3, 8, 0, -4, 2**70):
        refused(ArgumentValueError, "head_num", head_num=value)
    for value in (1, 4, 2**70):
        refused(ArgumentValueError, "key_value_head_num", key_value_head_num=value)
    for value in (0, -2):
        refused(ArgumentValueError, "key_value_head_num", key_value_head_num=value)
    refused(ArgumentValueError, "value heads", value=torch.zeros(8, 32, 1, 8))
    refused(ArgumentValueError, "key head size", key=torch.zeros(8, 32, 2, 8))


def test_cann_documents_no_further_limits():
    with limits("documented"):
        accepted(dtype=torch.float32, heads=64, kv_heads=1, key_dim=300, value_dim=7, page=48, tokens=9, window=3)


BAD_TYPES: list[Any] = [
    None, 96, 96.0, "96", {96}, iter([96]), [40.0, 40], [40, True], ["96", 1], [None, 1], [[40], [40]],
    np.array([96.0]), np.array([True]), torch.tensor([96.0]), torch.tensor([True]),
]  # fmt: skip


@pytest.mark.parametrize("argument", ["actual_seq_kvlen", "actual_seq_qlen"])
@pytest.mark.parametrize("lengths", BAD_TYPES, ids=repr)
def test_lengths_of_a_wrong_type(argument, lengths):
    if lengths is None and argument == "actual_seq_qlen":
        accepted(actual_seq_qlen=None)
    else:
        refused(ArgumentTypeError, argument, **{argument: lengths})


@pytest.mark.parametrize("argument", ["actual_seq_kvlen", "actual_seq_qlen"])
@pytest.mark.parametrize(
    "lengths",
    [[], [1], [1, 1, 1], [-1, 1], np.array([[1, 1]]), np.array(1), torch.tensor([[1, 1]]), torch.tensor(1)],
    ids=repr,
)
def test_lengths_of_a_wrong_value(argument, lengths):
    refused(ArgumentValueError, argument, **{argument: lengths})


def test_lengths_on_the_device_are_checked_but_for_their_values():
    meta = {name: value.to("meta") for name, value in arguments().items() if isinstance(value, torch.Tensor)}
    good = torch.zeros(2, dtype=torch.int64, device="meta")
    assert accepted(**meta, actual_seq_kvlen=good, actual_seq_qlen=good).device.type == "meta"
    for name in ("actual_seq_kvlen", "actual_seq_qlen"):
        refused(ArgumentTypeError, name, **meta | {name: good.float()})
        for shape in ((3,), (2, 1), ()):
            refused(ArgumentValueError, name, **meta | {name: good.new_zeros(shape)})
        refused(ArgumentValueError, name, **{name: good})


def test_lengths_fit_the_pages():
    accepted(actual_seq_kvlen=[128, 0])
    assert "index 1" in refused(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[128, 129])
    assert "128 tokens" in refused(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[2**20, 0])
    refused(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[2**40, 0])
    accepted(actual_seq_kvlen=[128, 128], block_table=None)
    message = refused(ArgumentValueError, "key.shape[0]", actual_seq_kvlen=[129, 1], block_table=None)
    assert "at least 10 pages" in message
    assert "block_table" in message
    one = {"key": torch.zeros(1, 32, 2, 16), "value": torch.zeros(1, 32, 2, 8)}
    refused(ArgumentValueError, "key.shape[0]", **one, actual_seq_kvlen=[0, 0], block_table=None)


def test_query_tokens_fit():
    accepted(tokens=3, actual_seq_qlen=[3, 0])
    refused(ArgumentValueError, "max(actual_seq_qlen)", tokens=3, actual_seq_qlen=[4, 0])
    assert "at index 1" in refused(
        ArgumentValueError, "actual_seq_qlen", tokens=3, actual_seq_qlen=[1, 3], actual_seq_kvlen=[40, 2]
    )
    accepted(tokens=3, actual_seq_kvlen=[40, 2])  # not given, not checked: the first query token sees nothing
    packed: dict[str, Any] = {"query": torch.zeros(3, 4, 16), "layout": "TND"}
    accepted(**packed, actual_seq_qlen=[2, 1])
    refused(ArgumentValueError, "sum(actual_seq_qlen)", **packed, actual_seq_qlen=[2, 2])
    refused(ArgumentValueError, "query.shape[0]", **packed)
    assert accepted(**packed, block_table=None, actual_seq_kvlen=[40] * 3, actual_seq_qlen=None).shape == (3, 4, 8)


def test_types_are_checked_before_values():
    refused(ArgumentTypeError, "page_block_size", window_size=0, page_block_size=None)
    refused(ArgumentTypeError, "actual_seq_kvlen", window_size=0, actual_seq_kvlen=None)
    refused(ArgumentTypeError, "key.dtype", window_size=0, key=torch.zeros(8, 32, 2, 16).half())


# --- the registered operator -----------------------------------------------------------------------------------------


def operator(**changes) -> Any:
    call = arguments()
    parts: dict[str, Any] = {
        "query": call["query"].flatten(0, 1),
        "key": call["key"],
        "value": call["value"],
        "block_table": call["block_table"],
        "lengths": torch.tensor([40, 40], dtype=torch.int32),
        "rows": None,
        "scale": 0.5,
        "window_size": 20,
        "impl": "reference",
    }
    return torch.ops.nsa_triton.sliding_window_attention_infer(**parts | changes)


def test_the_registered_operator_checks_by_itself():
    assert operator()[0].shape == (2, 4, 8)
    ints = torch.int32
    rows = torch.zeros(2, 2, dtype=ints)
    assert operator(rows=rows)[0].shape == (2, 4, 8)
    empty = operator(rows=rows, query=torch.zeros(0, 4, 16))
    assert [part.shape for part in empty] == [(0, 4, 8), (0, 4)]
    bad: list[dict[str, Any]] = [
        {"query": torch.zeros(3, 4, 16)},
        {"query": torch.zeros(0, 4, 16)},
        {"query": torch.zeros(2, 3, 16)},
        {"block_table": torch.zeros(3, 4, dtype=ints)},
        {"block_table": torch.zeros(0, 4, dtype=ints)},
        {"lengths": torch.zeros(3, dtype=ints)},
        {"lengths": torch.zeros(2, dtype=torch.int64)},
        {"rows": torch.zeros(2, 3, dtype=ints)},
        {"rows": torch.zeros(3, 2, dtype=ints)},
        {"key": torch.zeros(8, 32, 64)},
        {"key": torch.zeros(8, 32, 16, 2).mT},
        {"key": torch.zeros(8, 24, 2, 16), "value": torch.zeros(8, 24, 2, 8)},
        {"window_size": 0},
        {"impl": "fast"},
    ]
    for changes in bad:
        with pytest.raises((ArgumentValueError, ArgumentTypeError)):
            operator(**changes)


# --- indices ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _checking(monkeypatch):
    monkeypatch.setenv("NSA_TRITON_CHECK_INDICES", "1")


@pytest.mark.usefixtures("_checking")
def test_checked_pages_name_the_first_bad_entry():
    """40 tokens on pages of 32, of which a window of 20 sees tokens 20 to 39."""
    accepted()
    table = torch.tensor([[0, 8, -1, -1], [-1, 3, 99, 99]], dtype=torch.int32)
    assert "8 pages" in refused(ArgumentValueError, "block_table[0, 1]", block_table=table)
    table[0, 1] = 1
    assert "8 pages" in refused(ArgumentValueError, "block_table[1, 0]", block_table=table)
    accepted(block_table=table, window=8)  # tokens 32 to 39


@pytest.mark.usefixtures("_checking")
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


@pytest.mark.usefixtures("_checking")
def test_checked_lengths_fit_the_block_table():
    operator()
    for lengths in ([40, 129], [40, -1]):
        with pytest.raises(ArgumentValueError, match=r"actual_seq_kvlen\[1\]: expected an index from 0 to 128"):
            operator(lengths=torch.tensor(lengths, dtype=torch.int32))


@pytest.mark.usefixtures("_checking")
def test_checked_rows_are_rows_of_the_query():
    for rows in ([[0, 1], [1, 2]], [[0, 1], [3, 1]], [[0, 1], [1, -1]]):
        with pytest.raises(ArgumentValueError, match=r"actual_seq_qlen\[1\]: expected an index from 0"):
            operator(rows=torch.tensor(rows, dtype=torch.int32))


def test_indices_are_not_checked_by_default():
    accepted(block_table=torch.full((2, 4), 99, dtype=torch.int32))


# --- garbage ---------------------------------------------------------------------------------------------------------

GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_call(rng):
    sizes = {
        "batch": rng.choice([1, 2, 3]),
        "tokens": rng.choice([1, 1, 2]),
        "kv_heads": rng.choice([1, 2]),
        "heads": rng.choice([2, 4, 6]),
        "key_dim": rng.choice([16, 5]),
        "page": rng.choice([16, 48, 16, 20]),
        "window": rng.choice([1, 7, 64, 1000, 0]),
    }
    call = arguments(**sizes)
    batch, tokens = sizes["batch"], sizes["tokens"]
    if rng.random() < 0.5:
        call["key"], call["value"] = call["key"].flatten(2), call["value"].flatten(2)
    call["layout"] = rng.choice(["BSND", "BSH", "TND"])
    if call["layout"] == "BSH":
        call["query"] = call["query"].flatten(2)
    if call["layout"] == "TND":
        call["query"] = call["query"].flatten(0, 1)
        call["actual_seq_qlen"] = [tokens] * batch
    kind = rng.choice([list, tuple, np.asarray, torch.as_tensor])
    call["actual_seq_kvlen"] = kind([rng.choice([0, 1, 40, 64, 65]) for _ in range(batch)])
    if rng.random() < 0.3:
        call["block_table"] = None
    if rng.random() < 0.3:
        name = rng.choice(["query", "key", "value", "block_table"])
        if isinstance(call[name], torch.Tensor):
            shape = list(call[name].shape)
            shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 16])
            call[name] = torch.zeros(shape, dtype=rng.choice([call[name].dtype, torch.float16, torch.int64]))
    while rng.random() < 0.2:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call | {"impl": "reference"}


def succeeds(call):
    """Whether a call returns; if it raises, then one of the errors of this package, with all its parts."""
    try:
        nsa_sliding_window_attention_infer(**call)
    except NsaError as error:
        return ": expected " not in str(error)
    return True


def test_random_and_garbage_calls_work_or_raise_a_named_error():
    rng = random.Random(20)
    assert 100 < sum(succeeds(random_call(rng)) for _ in range(1500)) < 1400
