"""Every bad argument is refused by name before anything runs, and both sides of every limit are tried."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nsa_triton import ArgumentTypeError, ArgumentValueError, NsaError, limits
from nsa_triton.ops.compress_attention_infer import nsa_compress_attention_infer

BATCH, PAGE, COLUMNS = 2, 16, 3


def sized(
    heads=4, kv_heads=2, key_dim=8, value_dim=6, page=PAGE, window=32, stride=16, block=64, entries=4, tokens=1,
    dtype=torch.float32, **changes,
):  # fmt: skip
    """A call on the reference implementation whose tensors fit its numbers, with some arguments changed."""
    pages = BATCH * COLUMNS
    call = {
        "query": torch.zeros(BATCH * tokens, heads, key_dim, dtype=dtype),
        "key": torch.zeros(pages, page, max(0, kv_heads) * key_dim, dtype=dtype),
        "value": torch.zeros(pages, page, max(0, kv_heads) * value_dim, dtype=dtype),
        "scale_value": 0.5,
        "head_num": heads,
        "key_value_head_num": kv_heads,
        "select_block_size": block,
        "select_block_count": entries,
        "page_block_size": page,
        "compress_block_size": window,
        "compress_stride": stride,
        "block_table": torch.arange(pages, dtype=torch.int32).view(BATCH, COLUMNS),
        "actual_seq_qlen": [tokens] * BATCH,
        "actual_cmp_seq_kvlen": [20, 9],
        "impl": "reference",
    }
    return call | changes


def refused(error, argument, **changes):
    with pytest.raises(error) as caught:
        nsa_compress_attention_infer(**sized(**changes))
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected ")
    assert ", got " in str(caught.value)
    return str(caught.value)


def works(**changes):
    return nsa_compress_attention_infer(**sized(**changes))


def test_the_legal_call_is_legal():
    output, ids = works()
    assert output.shape == (2, 4, 6)
    assert ids.shape == (2, 2, 4)


@pytest.mark.parametrize("argument", ["query", "key", "value", "atten_mask", "block_table", "topk_mask"])
@pytest.mark.parametrize("value", [3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})
    refused(ArgumentTypeError, argument, **{argument: torch.zeros(2, 2).to_sparse()})


@pytest.mark.parametrize("argument", ["query", "key", "value"])
def test_tensors_are_required(argument):
    refused(ArgumentTypeError, argument, **{argument: None})


INTEGERS = [
    "head_num",
    "key_value_head_num",
    "select_block_size",
    "select_block_count",
    "page_block_size",
    "compress_block_size",
    "compress_stride",
]


@pytest.mark.parametrize("argument", INTEGERS)
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=repr)
def test_integers_are_ints(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("argument", INTEGERS)
def test_huge_and_negative_integers_are_named(argument):
    for value in (2**80, -16):
        with pytest.raises(ArgumentValueError, match=argument):
            works(**{argument: value})


def test_scale():
    for real in (1, 0.5, -2.0, 0, np.float32(0.5), np.float64(1e-3), np.int64(2)):
        works(scale_value=real)
    for other in (None, "1", True, 1j, torch.tensor(1.0), [1.0]):
        refused(ArgumentTypeError, "scale_value", scale_value=other)
    for value in (float("nan"), float("inf"), -float("inf"), np.float32("inf"), 10**400):
        refused(ArgumentValueError, "scale_value", scale_value=value)


@pytest.mark.parametrize(
    ("argument", "known"),
    [("layout", "TND, BSND"), ("importance", "cann, overlap"), ("impl", "auto, triton, reference")],
)
def test_words(argument, known):
    for value in ("", "BSH", "tnd", "exact"):
        assert known in refused(ArgumentValueError, argument, **{argument: value})
    for other in (None, 3, ["TND"]):
        refused(ArgumentTypeError, argument, **{argument: other})


@pytest.mark.parametrize("argument", ["num_init_blocks", "num_local_blocks"])
def test_forced_blocks(argument):
    given = {"actual_sel_seq_kvlen": [340, 160]}
    for value in (0, 1, 5000, None):
        works(**{argument: value}, **given)
        works(**{argument: value}, actual_sel_seq_kvlen=[336, 160], actual_seq_qlen=None)
    refused(ArgumentValueError, argument, **{argument: -1}, **given)
    for other in (1.0, "1", True, torch.tensor(1)):
        refused(ArgumentTypeError, argument, **{argument: other}, **given)
    assert argument in refused(ArgumentValueError, "actual_sel_seq_kvlen", **{argument: 1})
    refused(ArgumentValueError, "actual_cmp_seq_kvlen", **{argument: 1}, actual_sel_seq_kvlen=[352, 160])


def test_dtypes():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert works(dtype=dtype)[0].dtype == dtype
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        refused(ArgumentTypeError, "query.dtype", dtype=dtype)
    for name in ("key", "value"):
        assert "torch.float16" in refused(ArgumentTypeError, f"{name}.dtype", **{name: sized()[name].half()})
    for dtype in (torch.float32, torch.bool):
        refused(ArgumentTypeError, "block_table.dtype", block_table=sized()["block_table"].to(dtype))
    expected = works(block_table=sized()["block_table"])
    for dtype in (torch.int64, torch.int16, torch.uint8):
        assert torch.equal(works(block_table=sized()["block_table"].to(dtype))[0], expected[0])


def test_triton_does_not_compute_in_float64():
    with pytest.raises(ArgumentTypeError, match=r"query\.dtype.*reference"):
        works(dtype=torch.float64, impl="triton")


@pytest.mark.parametrize("argument", ["key", "value", "block_table"])
def test_devices_agree(argument):
    assert "meta" in refused(ArgumentValueError, f"{argument}.device", **{argument: sized()[argument].to("meta")})


@pytest.mark.parametrize("argument", ["query", "key", "value", "block_table"])
@pytest.mark.parametrize("shape", [(), (6,), (1, 2, 3, 4, 5)], ids=str)
def test_ranks(argument, shape):
    refused(ArgumentValueError, argument, **{argument: torch.zeros(shape, dtype=sized()[argument].dtype)})


def test_layouts_have_their_ranks():
    query = sized()["query"]
    refused(ArgumentValueError, "query", query=query[None])
    refused(ArgumentValueError, "query", layout="BSND")
    assert works(query=query[:, None], layout="BSND")[0].shape == (2, 1, 4, 6)


def test_sizes_agree():
    call = sized()
    apart = {"key": call["key"].view(6, 16, 2, 8), "value": call["value"].view(6, 16, 2, 6)}
    works(**apart)
    refused(ArgumentValueError, "head_num", head_num=8)
    refused(ArgumentValueError, "key_value_head_num", **apart, key_value_head_num=1)
    refused(ArgumentValueError, "key_value_head_num", key_value_head_num=0)
    refused(ArgumentValueError, "value heads", value=apart["value"][:, :, :1])
    refused(ArgumentValueError, "key.shape[2]", key=call["key"][..., :15])
    refused(ArgumentValueError, "value.shape[2]", value=call["value"][..., :11])
    refused(ArgumentValueError, "key head size", key=call["key"][..., :14])
    refused(ArgumentValueError, "key.shape[1]", page_block_size=32)
    refused(ArgumentValueError, "value.shape[1]", value=torch.zeros(6, 32, 12))
    refused(ArgumentValueError, "value.shape[0]", value=call["value"][:5])
    refused(ArgumentValueError, "key.shape[0]", key=call["key"][:0], value=call["value"][:0])
    refused(ArgumentValueError, "block_table.shape[1]", block_table=call["block_table"][:, :0])
    refused(ArgumentValueError, "actual_cmp_seq_kvlen", block_table=call["block_table"][:1])
    wide = call["query"][:, None]
    refused(ArgumentValueError, "block_table.shape[0]", query=wide, layout="BSND", block_table=call["block_table"][:1])


def test_caches_are_dense_in_the_last_dimension():
    call = sized()
    for name, argument in (("key", "key.stride(-1)"), ("value", "value.stride(-1)")):
        sparse = torch.stack((call[name], call[name]), dim=-1)[..., 0]
        assert "contiguous" in refused(ArgumentValueError, argument, **{name: sparse})
    works(query=torch.stack((call["query"], call["query"]), dim=-1)[..., 0])
    single = sized(key_dim=1, value_dim=1)
    nsa_compress_attention_infer(**single)


LIMITS = [
    ("compress_block_size", "window", [16, 48, 128], [0, 8, 24]),
    ("compress_stride", "stride", [16, 32], [0, 8, 48]),
    ("select_block_size", "block", [32, 48, 160], [0, 16, 40]),
    ("select_block_count", "entries", [1, 2, 5000], [0, -1]),
    ("page_block_size", "page", [16, 48, 256], [0, 8, 24]),
    ("head_num", "heads", [2, 4, 128], [0, 1, 3]),
    ("query head size (Dk)", "key_dim", [1, 3, 200], [0]),
    ("value head size (Dv)", "value_dim", [1, 9, 200], [0]),
    ("query tokens per batch (S)", "tokens", [1, 2, 7], [0]),
]


@pytest.mark.parametrize(("argument", "name", "legal", "illegal"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, legal, illegal):
    fitting = {"window": {"block": 128}, "stride": {"block": 64}}.get(name, {})
    for value in legal:
        works(**fitting, **{name: value})
    for value in illegal:
        refused(ArgumentValueError, argument, **fitting, **{name: value})


DOCUMENTED = [
    ("compress_block_size", {"window": 48, "block": 64}),
    ("compress_stride", {"window": 64, "stride": 48, "block": 96}),
    ("select_block_size", {"block": 128}),
    ("select_block_count", {"entries": 4097}),
    ("page_block_size", {"page": 144}),
    ("head_num / key_value_head_num (G)", {"heads": 256, "kv_heads": 1}),
    ("128 % G", {"heads": 6}),
    ("query head size (Dk)", {"key_dim": 193}),
    ("value head size (Dv)", {"value_dim": 129}),
    ("query tokens per batch (S)", {"tokens": 2}),
]


@pytest.mark.parametrize(("argument", "changes"), DOCUMENTED, ids=[row[0] for row in DOCUMENTED])
def test_documented_limits(argument, changes):
    works(dtype=torch.float16, **changes)
    with limits("documented"):
        works(dtype=torch.float16)
        message = refused(ArgumentValueError, argument, dtype=torch.float16, **changes)
        assert "documented limit of CANN" in message
        refused(ArgumentTypeError, "query.dtype")


# --- lengths ---------------------------------------------------------------------------------------------------------

KINDS = ["actual_seq_qlen", "actual_cmp_seq_kvlen", "actual_sel_seq_kvlen"]


@pytest.mark.parametrize("argument", KINDS)
@pytest.mark.parametrize(
    "lengths",
    [1, 1.0, "1", {1}, [1.0, 1], [1, True], ["1", 1], [[1], [1]], np.array([1.0, 1.0]), torch.tensor([1.0, 1.0])],
    ids=repr,
)
def test_lengths_of_a_wrong_type(argument, lengths):
    refused(ArgumentTypeError, argument, **{argument: lengths})


def test_compressed_lengths_are_required():
    assert "required" in refused(ArgumentTypeError, "actual_cmp_seq_kvlen", actual_cmp_seq_kvlen=None)


@pytest.mark.parametrize(
    "lengths", [[], [20], [20, 9, 1], [20, -1], [20, 49], [20, 2**40], np.array([[20, 9]]), torch.tensor(20)], ids=repr
)
def test_compressed_lengths_of_a_wrong_value(lengths):
    refused(ArgumentValueError, "actual_cmp_seq_kvlen", actual_cmp_seq_kvlen=lengths)


@pytest.mark.parametrize(
    "lengths",
    [
        (20, 9),
        np.array([20, 9]),
        np.array([20, 9], dtype=np.uint8),
        [np.int32(20), 9],
        torch.tensor([20, 9]),
        torch.tensor([20, 9], dtype=torch.int16),
        torch.tensor([20, 0, 9, 0])[::2],
    ],
    ids=repr,
)
def test_every_kind_of_length_list_means_the_same(lengths):
    assert all(torch.equal(a, b) for a, b in zip(works(actual_cmp_seq_kvlen=lengths), works(), strict=True))


def test_lengths_reach_to_the_last_entry_of_the_block_table():
    works(actual_cmp_seq_kvlen=[48, 0])
    message = refused(ArgumentValueError, "actual_cmp_seq_kvlen", actual_cmp_seq_kvlen=[0, 49])
    assert "49 at index 1" in message
    assert "at most 48" in message


def test_pages_are_dealt_without_a_block_table():
    generator = torch.Generator().manual_seed(0)
    caches = {
        "query": torch.randn(2, 4, 8, generator=generator),
        "key": torch.randn(6, 16, 16, generator=generator),
        "value": torch.randn(6, 16, 12, generator=generator),
    }
    dealt = works(**caches, block_table=None, actual_cmp_seq_kvlen=[20, 9])
    known = works(**caches, block_table=torch.tensor([[0, 1], [2, 3]]), actual_cmp_seq_kvlen=[20, 9])
    assert all(torch.equal(a, b) for a, b in zip(dealt, known, strict=True))
    works(block_table=None, actual_cmp_seq_kvlen=[48, 48])
    assert "block_table" in refused(ArgumentValueError, "key.shape[0]", block_table=None, actual_cmp_seq_kvlen=[49, 0])


def test_query_lengths():
    refused(ArgumentValueError, "query.shape[0]", tokens=2, actual_seq_qlen=None)
    refused(ArgumentValueError, "sum(actual_seq_qlen)", actual_seq_qlen=[1, 2])
    refused(ArgumentValueError, "actual_seq_qlen", actual_seq_qlen=[2])
    refused(ArgumentValueError, "actual_seq_qlen", actual_seq_qlen=[3, -1])
    works(actual_seq_qlen=[2, 0])
    query = torch.zeros(2, 3, 4, 8)
    refused(ArgumentValueError, "max(actual_seq_qlen)", query=query, layout="BSND", actual_seq_qlen=[4, 1])
    works(query=query, layout="BSND", actual_seq_qlen=[0, 3])


def several(**changes):
    """Three query tokens per batch, with a mask and raw lengths."""
    raw = [19 * 16 + 32, 8 * 16 + 32 + 15]
    return {"tokens": 3, "atten_mask": torch.ones(1), "actual_sel_seq_kvlen": raw} | changes


def test_raw_and_compressed_lengths_fit():
    works(**several())
    for raw, index, windows in (([336 - 1, 175], 0, 19), ([336 + 16, 175], 0, 21), ([336, 176], 1, 10)):
        message = refused(ArgumentValueError, "actual_cmp_seq_kvlen", **several(actual_sel_seq_kvlen=raw))
        assert f"{windows} at index {index}" in message
        assert str(raw[index]) in message
        works(**several(actual_sel_seq_kvlen=raw, atten_mask=None))
    works(**several(actual_cmp_seq_kvlen=[20, 0], actual_sel_seq_kvlen=[336, 31]))
    refused(
        ArgumentValueError,
        "actual_cmp_seq_kvlen",
        **several(actual_cmp_seq_kvlen=[20, 0], actual_sel_seq_kvlen=[336, 32]),
    )
    works(**several(actual_cmp_seq_kvlen=[20, 0], actual_sel_seq_kvlen=[336, 3]))
    message = refused(
        ArgumentValueError, "actual_seq_qlen", **several(actual_cmp_seq_kvlen=[20, 0], actual_sel_seq_kvlen=[336, 2])
    )
    assert "at most 2 at index 1" in message
    for raw in ([336], [336, -1], [336, 2**40]):
        refused(ArgumentValueError, "actual_sel_seq_kvlen", **several(actual_sel_seq_kvlen=raw))
    batched = {"query": torch.zeros(2, 3, 4, 8), "layout": "BSND", "actual_seq_qlen": None}
    works(**several(**batched))
    refused(ArgumentValueError, "actual_cmp_seq_kvlen", **several(**batched, actual_sel_seq_kvlen=[335, 175]))


# --- tensors of indices ----------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch):
    monkeypatch.setenv("NSA_TRITON_CHECK_INDICES", "1")


def operator(**changes):
    """The registered operator, which looks at values in this mode only."""
    call = {
        "query": torch.zeros(3, 4, 8),
        "key": torch.zeros(6, 16, 2, 8),
        "value": torch.zeros(6, 16, 2, 6),
        "block_table": torch.arange(6).view(2, 3),
        "lengths": torch.tensor([20, 9]),
        "rows": torch.tensor([[0, 2], [2, 1]]),
        "raw_lengths": None,
    } | changes
    tensors = {
        name: tensor.int() if tensor is not None and not tensor.is_floating_point() else tensor
        for name, tensor in call.items()
    }
    return torch.ops.nsa_triton.compress_attention_infer(*tensors.values(), 1.0, 32, 16, 64, 4, "cann", "reference")


BAD = [
    ("block_table[0, 1]", {"block_table": torch.tensor([[0, 6, -1], [3, -1, -1]])}),
    ("block_table[1, 0]", {"block_table": torch.tensor([[0, 1, -1], [-1, -1, -1]])}),
    ("actual_cmp_seq_kvlen[1]", {"lengths": torch.tensor([48, 49])}),
    ("actual_cmp_seq_kvlen[0]", {"lengths": torch.tensor([-1, 4])}),
    ("actual_seq_qlen[1]", {"rows": torch.tensor([[0, 2], [2, 2]])}),
    ("actual_seq_qlen[0]", {"rows": torch.tensor([[0, -1], [2, 1]])}),
    ("actual_cmp_seq_kvlen", {"raw_lengths": torch.tensor([336, 159])}),
    ("actual_seq_qlen", {"raw_lengths": torch.tensor([336, 0]), "lengths": torch.tensor([20, 0])}),
]


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(("argument", "changes"), BAD, ids=[row[0] for row in BAD])
def test_bad_indices_are_named_in_the_checking_mode(argument, changes):
    operator()
    operator(block_table=torch.tensor([[0, 1, -1], [3, 99, -7]]))  # not read
    operator(raw_lengths=torch.tensor([336, 160]))
    with pytest.raises(ArgumentValueError) as caught:
        operator(**changes)
    assert str(caught.value).startswith(f"{argument}: expected ")


def test_bad_indices_pass_without_the_checking_mode():
    for _, changes in BAD:
        assert operator(**changes)[0].shape == (3, 4, 6)


def test_the_registered_operator_checks_by_itself():
    """torch.ops and compiled graphs do not come through the checks of the public function."""
    operator(rows=None, query=torch.zeros(4, 4, 8))
    for argument, changes in (
        ("query.shape[0]", {"rows": None}),
        ("rows.shape[1]", {"rows": torch.zeros(2, 3).int()}),
        ("lengths.shape[0]", {"lengths": torch.tensor([1])}),
        ("raw_lengths.shape[0]", {"raw_lengths": torch.tensor([1])}),
        ("key_value_head_num", {"key": torch.zeros(6, 16, 0, 8), "value": torch.zeros(6, 16, 0, 6)}),
        ("page_block_size", {"key": torch.zeros(6, 8, 2, 8), "value": torch.zeros(6, 8, 2, 6)}),
        ("key.stride(-1)", {"key": torch.zeros(6, 16, 8, 2).mT}),
    ):
        with pytest.raises(ArgumentValueError) as caught:
            operator(**changes)
        assert str(caught.value).startswith(f"{argument}: expected "), caught.value
    tensors = torch.zeros(1, 4, 8), torch.zeros(6, 16, 2, 8), torch.zeros(6, 16, 2, 6)
    indices = torch.zeros(1, 3).int(), torch.zeros(1).int(), None, None
    for bad in (("exact", "reference"), ("cann", "fast")):
        with pytest.raises(ArgumentValueError):
            torch.ops.nsa_triton.compress_attention_infer(*tensors, *indices, 1.0, 32, 16, 64, 4, *bad)
    long = (indices[0], indices[1].long(), None, None)
    with pytest.raises(ArgumentTypeError, match="lengths"):
        torch.ops.nsa_triton.compress_attention_infer(*tensors, *long, 1.0, 32, 16, 64, 4, "cann", "reference")


# --- garbage ---------------------------------------------------------------------------------------------------------

GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_call(rng):
    call = sized(
        heads=rng.choice([2, 4, 4, 14, 3]),
        page=rng.choice([16, 16, 32, 20]),
        window=rng.choice([16, 32, 32, 48, 7]),
        stride=rng.choice([16, 16, 16, 32, 0]),
        block=rng.choice([32, 64, 64, 96, 5]),
        entries=rng.choice([1, 4, 40, 0]) if rng.random() < 0.3 else 4,
        tokens=rng.choice([1, 1, 2, 3]),
        importance=rng.choice(["cann", "overlap"]),
    )
    call["actual_cmp_seq_kvlen"] = [rng.choice([0, 1, 16, 47, 48, 49]) for _ in range(BATCH)]
    if rng.random() < 0.3:
        call["actual_sel_seq_kvlen"] = [rng.choice([0, 31, 32, 16 * 46 + 32]) for _ in range(BATCH)]
        call["atten_mask"] = torch.ones(1)
    if rng.random() < 0.3:
        del call["block_table"]
    while rng.random() < 0.25:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call | {"impl": "reference"}


def succeeds(call):
    """Whether a call returns; if it raises, then one of the errors of this package, with all its parts."""
    try:
        nsa_compress_attention_infer(**call)
    except NsaError as error:
        return ": expected " not in str(error)
    return True


def test_random_and_garbage_calls_work_or_raise_a_named_error():
    rng = random.Random(20)
    assert 100 < sum(succeeds(random_call(rng)) for _ in range(1500)) < 1400
