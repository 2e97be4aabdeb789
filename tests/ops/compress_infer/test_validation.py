"""Every bad argument is refused by name before anything is written, and both sides of every limit are tried."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from nsa_triton import ArgumentTypeError, ArgumentValueError, NsaError, limits
from nsa_triton.ops.compress_infer import nsa_compress_infer, reference
from tests.ops.compress_infer.cases import make

LENGTHS = [48, 43, 80]


def arguments(**changes):
    """A legal call on the reference implementation, with some arguments changed."""
    return make(LENGTHS, 2, 32).arguments(actual_seq_len=LENGTHS, impl="reference") | changes


def packed(**changes):
    return make(LENGTHS, 2, 32, page=None).arguments(actual_seq_len=LENGTHS, impl="reference") | changes


def refused(error, argument, call=None, **changes):
    """The message of a refusal that has changed nothing."""
    given = (arguments() if call is None else call) | changes
    before = given["cache"].clone() if isinstance(given["cache"], torch.Tensor) else None
    with pytest.raises(error) as caught:
        nsa_compress_infer(**given)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{argument}: expected ")
    assert ", got " in str(caught.value)
    if before is not None and given["cache"].device.type == "cpu":
        assert torch.equal(given["cache"].to_dense(), before.to_dense())
    return str(caught.value)


@pytest.mark.parametrize("argument", ["input", "weight", "slot_mapping", "cache", "block_table"])
@pytest.mark.parametrize("value", [3, [[1.0]], np.zeros((2, 2)), "tensor"], ids=lambda v: type(v).__name__)
def test_tensors_are_tensors(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})
    if argument != "block_table":
        refused(ArgumentTypeError, argument, **{argument: None})
    refused(ArgumentTypeError, argument, **{argument: torch.zeros(3, 2).to_sparse()})


@pytest.mark.parametrize("argument", ["compress_block_size", "compress_stride", "page_block_size", "new_tokens"])
@pytest.mark.parametrize("value", [None, 32.0, "32", True, np.int64(32), torch.tensor(32)], ids=lambda v: repr(v))
def test_integers_are_ints(argument, value):
    refused(ArgumentTypeError, argument, **{argument: value})


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_dtypes_that_no_one_computes_in(dtype):
    tensors = {name: arguments()[name].to(dtype) for name in ("input", "weight", "cache")}
    with pytest.raises(ArgumentTypeError, match=r"input\.dtype: expected "):
        nsa_compress_infer(**arguments(**tensors))


@pytest.mark.parametrize("argument", ["weight", "cache"])
def test_tensors_agree(argument):
    tensor = arguments()[argument]
    assert "torch.float32" in refused(ArgumentTypeError, f"{argument}.dtype", **{argument: tensor.half()})
    refused(ArgumentValueError, f"{argument}.device", **{argument: tensor.to("meta")})
    shape = {"weight": "[compress_block_size, N]", "cache": "[rows, N, D]"}[argument]
    assert shape in refused(ArgumentValueError, argument, **{argument: tensor[None]})
    assert shape in refused(ArgumentValueError, argument, **{argument: tensor[0]})


def test_weight_and_cache_fit():
    refused(ArgumentValueError, "weight.shape[0]", weight=torch.zeros(16, 2))
    refused(ArgumentValueError, "weight.shape[1]", weight=torch.zeros(32, 3))
    refused(ArgumentValueError, "cache.shape[1]", cache=torch.zeros(9, 1, 32))
    refused(ArgumentValueError, "cache.shape[2]", cache=torch.zeros(9, 2, 16))


def test_pages_go_with_a_block_table_and_packed_tokens_without():
    assert "Pass block_table" in refused(ArgumentValueError, "block_table", block_table=None)
    table = arguments()["block_table"]
    assert "[pages, page, N, D]" in refused(ArgumentValueError, "input", packed(block_table=table))
    for shape in ((), (32,), (171, 64), (1, 2, 3, 4, 5)):
        refused(ArgumentValueError, "input", input=torch.zeros(shape))
        refused(ArgumentValueError, "input", packed(input=torch.zeros(shape)))
    assert nsa_compress_infer(**packed(page_block_size=512)).shape == packed()["cache"].shape
    refused(ArgumentValueError, "page_block_size", packed(page_block_size=24))


def test_page_block_size_is_that_of_the_pages():
    assert "16" in refused(ArgumentValueError, "page_block_size", page_block_size=32)


def test_there_are_pages():
    call = arguments()
    refused(ArgumentValueError, "input.shape[0]", input=call["input"][:0])
    refused(ArgumentValueError, "block_table.shape[1]", block_table=call["block_table"][:, :0])


def test_the_last_dimension_is_dense():
    for name in ("input", "cache"):
        tensor = arguments()[name]
        turned = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert "side by side" in refused(ArgumentValueError, f"{name}.stride(-1)", **{name: turned})


def test_features_of_one_element_have_no_stride():
    call = make(LENGTHS, 2, 1)
    expected = call.run(reference.forward)
    wide = call.input.new_zeros(*call.input.shape[:-1], 3)[..., :1].copy_(call.input)
    spread = torch.as_strided(wide, wide.shape, (*wide.stride()[:-1], 3))
    torch.testing.assert_close(nsa_compress_infer(**call.arguments(input=spread)), expected)


@pytest.mark.parametrize("argument", ["slot_mapping", "block_table"])
def test_tensors_of_indices(argument):
    tensor = arguments()[argument]
    for bad in (tensor.float(), tensor.bool()):
        refused(ArgumentTypeError, f"{argument}.dtype", **{argument: bad})
    refused(ArgumentValueError, f"{argument}.device", **{argument: tensor.to("meta")})
    refused(ArgumentValueError, argument, **{argument: tensor[None]})
    if argument == "block_table":
        assert "3, the batches" in refused(ArgumentValueError, "block_table.shape[0]", block_table=tensor[:2])
        refused(ArgumentValueError, argument, block_table=tensor[0])


def test_slots_are_one_per_window():
    slots = arguments()["slot_mapping"]
    assert slots.shape == (3, 1)
    one = nsa_compress_infer(**arguments(slot_mapping=slots))
    assert torch.equal(nsa_compress_infer(**arguments(slot_mapping=slots[:, 0])), one)
    refused(ArgumentValueError, "slot_mapping", slot_mapping=torch.tensor(3))
    refused(ArgumentValueError, "slot_mapping.shape", slot_mapping=torch.zeros(3, 2, dtype=torch.int32))
    wide = torch.full((3, 2), -1, dtype=torch.int32)
    assert "[3, 2]" in refused(ArgumentValueError, "slot_mapping.shape", slot_mapping=slots, new_tokens=17)
    refused(ArgumentValueError, "slot_mapping", slot_mapping=slots[:, 0], new_tokens=17)
    nsa_compress_infer(**arguments(slot_mapping=wide, new_tokens=17))
    refused(ArgumentValueError, "slot_mapping.shape", slot_mapping=wide, new_tokens=16)


def sized(*, heads=2, size=32, block=32, stride=16, page=64, new_tokens=1, batch=1, dtype=torch.float16):
    """A call whose tensors fit its numbers, whether these are legal or not."""
    return {
        "input": torch.zeros(3, max(page, 0), heads, size, dtype=dtype),
        "weight": torch.zeros(max(block, 0), heads, dtype=dtype),
        "slot_mapping": torch.full((batch, max(1, -(-new_tokens // (stride or 1)))), -1),
        "compress_block_size": block,
        "compress_stride": stride,
        "page_block_size": page,
        "block_table": torch.zeros(batch, 3, dtype=torch.int32),
        "actual_seq_len": [128] * batch,
        "cache": torch.zeros(2, heads, size, dtype=dtype),
        "new_tokens": new_tokens,
        "impl": "reference",
    }


# argument, name, accepted by both columns, by the structural one only, by none
LIMITS = [
    ("compress_block_size", "block", [16, 32, 64], [80, 128], [0, -16, 8, 65, 144]),
    ("compress_stride", "stride", [16, 32], [], [0, -16, 8, 15, 48]),
    ("page_block_size", "page", [64, 128], [16, 48, 96, 256], [0, 8, 65]),
    ("len(actual_seq_len) (B)", "batch", [1, 2048], [2049], [0]),
    ("input heads (N)", "heads", [1, 51, 64], [65, 256], [0]),
    ("input head size (D)", "size", [16, 48, 256], [1, 8, 127, 272], [0]),
    ("new_tokens", "new_tokens", [1], [2, 40], [0, -1]),
    ("input.dtype", "dtype", [torch.float16, torch.bfloat16], [torch.float32, torch.float64], [torch.int32]),
]


@pytest.mark.parametrize(("argument", "name", "both", "structural", "none"), LIMITS, ids=[row[1] for row in LIMITS])
def test_both_sides_of_the_limits(argument, name, both, structural, none):
    error = ArgumentTypeError if name == "dtype" else ArgumentValueError
    extra = {"stride": 16} if name == "block" else {}
    for value in (*both, *structural):
        nsa_compress_infer(**sized(**extra, **{name: value}))
    with limits("documented"):
        for value in both:
            nsa_compress_infer(**sized(**extra, **{name: value}))
        for value in structural:
            assert "CANN" in refused(error, argument, sized(**extra, **{name: value}))
    for value in none:
        refused(error, argument, sized(**extra, **{name: value}))


def test_huge_integers_are_named_too():
    for name in ("compress_block_size", "compress_stride", "page_block_size", "new_tokens"):
        refused(ArgumentValueError, name, **{name: 2**80})


@pytest.mark.parametrize(
    "lengths", [None, 48, "48", {48}, [48.0, 1, 2], [True, 1, 2], np.zeros(3), torch.zeros(3)], ids=repr
)
def test_lengths_of_a_wrong_type(lengths):
    refused(ArgumentTypeError, "actual_seq_len", actual_seq_len=lengths)


@pytest.mark.parametrize(
    "lengths",
    [[48, -1, 80], np.array([[48, 43, 80]]), torch.tensor(48), torch.zeros(3, 1, dtype=torch.int32)],
    ids=repr,
)
def test_lengths_of_a_wrong_value(lengths):
    refused(ArgumentValueError, "actual_seq_len", actual_seq_len=lengths)


def test_as_many_lengths_as_batches():
    refused(ArgumentValueError, "len(actual_seq_len) (B)", actual_seq_len=[])
    for lengths in ([48], [48, 43, 80, 16]):
        refused(ArgumentValueError, "slot_mapping.shape", actual_seq_len=lengths)
        slots = torch.zeros(len(lengths), 1, dtype=torch.int32)
        refused(ArgumentValueError, "block_table.shape[0]", actual_seq_len=lengths, slot_mapping=slots)
    refused(ArgumentValueError, "actual_seq_len", actual_seq_len=torch.zeros(3, dtype=torch.int32, device="meta"))


def test_packed_lengths_fit_in_the_input():
    assert "prefix" in refused(ArgumentValueError, "sum(actual_seq_len)", packed(actual_seq_len=[48, 91, 171]))
    call = packed()
    tokens = call["input"].shape[0]
    nsa_compress_infer(**packed(actual_seq_len=[0, 0, tokens]))
    refused(ArgumentValueError, "sum(actual_seq_len)", call, actual_seq_len=(0, 1, tokens))


@pytest.mark.parametrize(
    "kind",
    [tuple, np.array, torch.tensor, torch.IntTensor, np.uint8],
    ids=["tuple", "numpy", "int64", "int32", "uint8"],
)
def test_every_kind_of_lengths_means_the_same(kind):
    expected = nsa_compress_infer(**arguments())
    assert torch.equal(nsa_compress_infer(**arguments(actual_seq_len=kind(LENGTHS))), expected)


def test_no_tokens_and_few_tokens_write_nothing():
    for call in (arguments(actual_seq_len=[0, 31, 17]), packed(actual_seq_len=[0, 31, 17])):
        before = call["cache"].clone()
        assert torch.equal(nsa_compress_infer(**call), before)
    empty = packed()
    empty |= {"input": empty["input"][:0], "actual_seq_len": [0, 0, 0]}
    before = empty["cache"].clone()
    assert torch.equal(nsa_compress_infer(**empty), before)


def test_a_cache_without_rows_takes_nothing():
    call = arguments()
    call["cache"] = call["cache"][:0]
    assert nsa_compress_infer(**call).shape == (0, 2, 32)
    assert nsa_compress_infer(**call | {"impl": "auto"}).shape == (0, 2, 32)


def test_impl_is_one_of_three():
    assert "auto, triton, reference" in refused(ArgumentValueError, "impl", impl="cuda")
    refused(ArgumentTypeError, "impl", impl=None)


def test_triton_does_not_compute_in_float64():
    wide = {name: arguments()[name].double() for name in ("input", "weight", "cache")}
    assert "reference" in refused(ArgumentTypeError, "input.dtype", impl="triton", **wide)


def test_the_registered_operator_checks_by_itself():
    call = make(LENGTHS)
    good = [call.input, call.weight, call.slots, call.table, call.lengths, call.cache, 32, 16, 16, 1, "reference"]
    torch.ops.nsa_triton.compress_infer(*good)
    wrong = {
        2: call.slots[:2],
        3: torch.zeros(3, 0, dtype=torch.int32),
        4: call.lengths.float(),
        5: call.cache[0],
        6: 24,
        8: 32,
        9: 0,
        10: "fast",
    }
    for place, value in wrong.items():
        with pytest.raises((ArgumentValueError, ArgumentTypeError)):
            torch.ops.nsa_triton.compress_infer(*good[:place], value, *good[place + 1 :])


GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


def random_call(rng):
    lengths = [rng.choice([0, 15, 16, 32, 48, 100]) for _ in range(rng.randrange(1, 4))]
    block, stride = rng.choice([16, 32, 48, 128, 7]), rng.choice([16, 16, 16, 32, 0, -16])
    new_tokens, page = rng.choice([1, 1, 2, 17]), rng.choice([16, 48, None, 24])
    heads, size = rng.choice([1, 2, 65]), rng.choice([16, 5, 33])
    call = make(lengths, heads, size, max(block, 16), max(stride, 16), page, new_tokens, seed=rng.randrange(99))
    given = call.arguments(compress_block_size=block, compress_stride=stride, impl="reference")
    given["actual_seq_len"] = rng.choice([list, tuple, np.asarray, torch.as_tensor])(lengths)
    while rng.random() < 0.3:
        given[rng.choice(list(given))] = rng.choice(GARBAGE)
    return given


def test_random_and_garbage_calls_work_or_raise_a_named_error():
    rng, done = random.Random(20), 0
    for _ in range(1000):
        try:
            nsa_compress_infer(**random_call(rng))
            done += 1
        except NsaError as error:
            assert ": expected " in str(error)  # noqa: PT017
    assert 100 < done < 900
