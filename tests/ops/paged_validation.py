"""Validation of the ops that attend to a paged cache: what all of them refuse and take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from tests.ops.calls import Validation, succeeds, with_garbage


def paged_arguments(
    *,
    batch=2,
    tokens=1,
    heads=4,
    kv_heads=2,
    key_dim=16,
    value_dim=8,
    page=32,
    dtype=torch.float32,
    **changes,
) -> dict[str, Any]:
    """What legal calls of all these ops have: BSND, 4 pages for each batch; `changes` replace arguments or add some."""
    n_pages = 4 * max(batch, 1)
    legal = {
        "query": torch.zeros(batch, tokens, heads, key_dim, dtype=dtype),
        "key": torch.zeros(n_pages, page, kv_heads, key_dim, dtype=dtype),
        "value": torch.zeros(n_pages, page, kv_heads, value_dim, dtype=dtype),
        "scale_value": 0.5,
        "head_num": heads,
        "key_value_head_num": kv_heads,
        "page_block_size": page,
        "block_table": torch.arange(4 * batch, dtype=torch.int32).view(batch, 4),
        "actual_seq_kvlen": [40] * batch,
        "impl": "reference",
    }
    return legal | changes


def paged_parts() -> dict[str, Any]:
    """The same call as arguments of the registered operators."""
    call = paged_arguments()
    return {
        "query": call["query"].flatten(0, 1),
        "key": call["key"],
        "value": call["value"],
        "block_table": call["block_table"],
        "lengths": torch.tensor([40, 40], dtype=torch.int32),
        "rows": None,
        "scale": 0.5,
        "impl": "reference",
    }


# argument in messages; sizes that change together; legal and illegal values
PAGED_LIMITS: list[Any] = [
    ("page_block_size", "page", [16, 48, 64, 256], [0, 8, 24]),
    ("query head size (Dk)", "key_dim", [1, 7, 192, 300], [0]),
    ("value head size (Dv)", "value_dim", [1, 7, 128, 300], [0]),
    ("query tokens per batch (S)", "tokens", [1, 4, 9], [0]),
    ("batches (B)", "batch", [1, 5], [0]),
    ("key_value_head_num", "kv_heads", [1, 4], [0]),
    ("head_num", "heads", [2, 6, 64], [0, 1, 5]),
]

BAD_TYPES: list[Any] = [
    None, 96, 96.0, "96", {96}, iter([96]), [40.0, 40], [40, True], ["96", 1], [None, 1], [[40], [40]],
    np.array([96.0]), np.array([True]), torch.tensor([96.0]), torch.tensor([True]),
]  # fmt: skip


def random_sizes(rng: Random) -> dict[str, Any]:
    return {
        "batch": rng.choice([1, 2, 3]),
        "tokens": rng.choice([1, 1, 2]),
        "kv_heads": rng.choice([1, 2]),
        "heads": rng.choice([2, 4, 6]),
        "key_dim": rng.choice([16, 5]),
        "page": rng.choice([16, 48, 16, 20]),
    }


def at_random(call: dict[str, Any], of_tokens: Sequence[str], rng: Random) -> dict[str, Any]:
    """A legal call in any layout, with any kind of lengths, and sometimes with a tensor of another shape or dtype.
    `of_tokens` are its tensors that have a row for each query token."""
    batch, tokens = call["query"].shape[:2]
    if rng.random() < 0.5:
        call["key"], call["value"] = call["key"].flatten(2), call["value"].flatten(2)
    call["layout"] = rng.choice(["BSND", "BSH", "TND"])
    if call["layout"] == "BSH":
        call["query"] = call["query"].flatten(2)
    if call["layout"] == "TND":
        call |= {name: call[name].flatten(0, 1) for name in of_tokens}
        call["actual_seq_qlen"] = [tokens] * batch
    kind: Any = rng.choice([list, tuple, np.asarray, torch.as_tensor])
    call["actual_seq_kvlen"] = kind([rng.choice([0, 1, 40, 64, 65]) for _ in range(batch)])
    if rng.random() < 0.3:
        call["block_table"] = None
    if rng.random() < 0.3:
        name = rng.choice([*of_tokens, "key", "value", "block_table"])
        if isinstance(call[name], torch.Tensor):
            shape = list(call[name].shape)
            shape[rng.randrange(len(shape))] += rng.choice([-1, 1, 16])
            call[name] = torch.zeros(shape, dtype=rng.choice([call[name].dtype, torch.float16, torch.int64]))
    return call


class PagedValidation(Validation):
    """An op says how it is called and inherits these tests."""

    operator: ClassVar[Callable[..., Any]]  # the registered operator, of paged_parts() and what it takes besides
    indices: ClassVar[tuple[str, ...]] = ("block_table",)
    bad_number: ClassVar[dict[str, Any]]  # an argument of function and operator alike, of a type that is right
    bad_parts: ClassVar[list[dict[str, Any]]] = []  # what else the operator refuses

    def packed(self, tokens: int) -> dict[str, Any]:
        """The arguments that have a row for each query token, as function (TND) and operator take them."""
        return {"query": torch.zeros(tokens, 4, 16)}

    def own_sizes(self, rng: Random) -> dict[str, Any]:
        """The sizes that this op has besides random_sizes()."""
        raise NotImplementedError

    def test_the_legal_call_is_legal(self):
        assert self.accepted().shape == (2, 1, 4, 8)

    def test_layouts_and_flags(self):
        for value in ("TNH", "bsnd", ""):
            assert "BSH, BSND, TND" in self.refused(ArgumentValueError, "layout", layout=value)
        self.refused(ArgumentTypeError, "layout", layout=None)
        for flag in (None, 1, "yes"):
            self.refused(ArgumentTypeError, "return_lse", return_lse=flag)

    def test_tensors_agree(self):
        given = self.calls.arguments()
        for name in ("key", "value"):
            assert "float32" in self.refused(ArgumentTypeError, f"{name}.dtype", **{name: given[name].half()})
        for name in ("key", "value", *self.indices):
            assert "meta" in self.refused(ArgumentValueError, f"{name}.device", **{name: given[name].to("meta")})
        for name in self.indices:
            for dtype in (torch.float32, torch.bool):
                self.refused(ArgumentTypeError, f"{name}.dtype", **{name: given[name].to(dtype)})

    def test_triton_does_not_compute_in_float64(self):
        with pytest.raises(ArgumentTypeError, match=r"query\.dtype.*reference"):
            self.accepted(dtype=torch.float64, impl="triton")

    def test_ranks(self):
        zeros: Any = torch.zeros
        shape: tuple[int, ...]
        for shape in ((), (8,), (2, 4, 16), (2, 1, 4, 16, 1)):
            self.refused(ArgumentValueError, "query", query=zeros(shape))
        for shape in ((), (2, 4, 16, 1), (2, 4)):
            self.refused(ArgumentValueError, "query", query=zeros(shape), layout="TND")
        for shape in ((), (2, 1, 4, 16), (2, 4)):
            self.refused(ArgumentValueError, "query", query=zeros(shape), layout="BSH")
        for name in ("key", "value"):
            for shape in ((), (8, 32), (8, 32, 2, 16, 1)):
                self.refused(ArgumentValueError, name, **{name: zeros(shape)})
        for shape in ((), (8,), (2, 4, 1)):
            self.refused(ArgumentValueError, "block_table", block_table=zeros(shape, dtype=torch.int32))

    def test_shapes_agree(self):
        zeros, ints = torch.zeros, torch.int32
        self.refused(ArgumentValueError, "value.shape[0]", value=zeros(7, 32, 2, 8))
        self.refused(ArgumentValueError, "key.shape[1]", key=zeros(8, 48, 2, 16))
        self.refused(ArgumentValueError, "value.shape[1]", value=zeros(8, 48, 2, 8))
        self.refused(ArgumentValueError, "key.shape[1]", page_block_size=64)
        self.refused(ArgumentValueError, "key.shape[0]", key=zeros(0, 32, 2, 16), value=zeros(0, 32, 2, 8))
        self.refused(ArgumentValueError, "block_table.shape[0]", block_table=zeros(3, 4, dtype=ints))
        none = {"block_table": zeros(2, 0, dtype=ints), "actual_seq_kvlen": [0, 0]}
        self.refused(ArgumentValueError, "block_table.shape[1]", **none)
        self.refused(ArgumentValueError, "query.shape[2]", query=zeros(2, 1, 63), layout="BSH")
        self.refused(ArgumentValueError, "key.shape[2]", key=zeros(8, 32, 33))
        self.refused(ArgumentValueError, "value.shape[2]", value=zeros(8, 32, 17))

    def test_caches_are_dense_in_their_last_dimension_only(self):
        self.refused(ArgumentValueError, "key.stride(-1)", key=torch.zeros(8, 32, 16, 2).mT)
        self.refused(ArgumentValueError, "value.stride(-1)", value=torch.zeros(8, 32, 2, 16)[..., ::2])
        self.refused(ArgumentValueError, "value.stride(-1)", value=torch.zeros(8, 32, 32)[..., ::2])
        self.accepted(key=torch.zeros(8, 2, 32, 16).transpose(1, 2), value=torch.zeros(8, 32, 4, 24)[:, :, ::2, 3:11])
        self.accepted(value=torch.zeros(8, 32, 2, 2)[..., ::2])  # a head of one column

    def test_numbers_of_heads_are_those_of_the_tensors(self):
        for value in (3, 8, 0, -4, 2**70):
            self.refused(ArgumentValueError, "head_num", head_num=value)
        for value in (1, 4, 2**70):
            self.refused(ArgumentValueError, "key_value_head_num", key_value_head_num=value)
        for value in (0, -2):
            self.refused(ArgumentValueError, "key_value_head_num", key_value_head_num=value)
        self.refused(ArgumentValueError, "value heads", value=torch.zeros(8, 32, 1, 8))
        self.refused(ArgumentValueError, "key head size", key=torch.zeros(8, 32, 2, 8))

    @pytest.mark.parametrize("argument", ["actual_seq_kvlen", "actual_seq_qlen"])
    @pytest.mark.parametrize("lengths", BAD_TYPES, ids=repr)
    def test_lengths_of_a_wrong_type(self, argument, lengths):
        if lengths is None and argument == "actual_seq_qlen":
            self.accepted(actual_seq_qlen=None)
        else:
            self.refused(ArgumentTypeError, argument, **{argument: lengths})

    @pytest.mark.parametrize("argument", ["actual_seq_kvlen", "actual_seq_qlen"])
    @pytest.mark.parametrize(
        "lengths",
        [[], [1], [1, 1, 1], [-1, 1], np.array([[1, 1]]), np.array(1), torch.tensor([[1, 1]]), torch.tensor(1)],
        ids=repr,
    )
    def test_lengths_of_a_wrong_value(self, argument, lengths):
        self.refused(ArgumentValueError, argument, **{argument: lengths})

    def test_lengths_on_the_device_are_checked_but_for_their_values(self):
        given = self.calls.arguments()
        meta = {name: value.to("meta") for name, value in given.items() if isinstance(value, torch.Tensor)}
        good = torch.zeros(2, dtype=torch.int64, device="meta")
        assert self.accepted(**meta, actual_seq_kvlen=good, actual_seq_qlen=good).device.type == "meta"
        for name in ("actual_seq_kvlen", "actual_seq_qlen"):
            self.refused(ArgumentTypeError, name, **meta | {name: good.float()})
            for shape in ((3,), (2, 1), ()):
                self.refused(ArgumentValueError, name, **meta | {name: good.new_zeros(shape)})
            self.refused(ArgumentValueError, name, **{name: good})

    def test_lengths_fit_the_pages(self):
        self.accepted(actual_seq_kvlen=[128, 0])
        assert "index 1" in self.refused(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[128, 129])
        assert "128 tokens" in self.refused(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[2**20, 0])
        self.refused(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[2**40, 0])
        self.accepted(actual_seq_kvlen=[128, 128], block_table=None)
        message = self.refused(ArgumentValueError, "key.shape[0]", actual_seq_kvlen=[129, 1], block_table=None)
        assert "at least 10 pages" in message
        assert "block_table" in message
        one = {"key": torch.zeros(1, 32, 2, 16), "value": torch.zeros(1, 32, 2, 8)}
        self.refused(ArgumentValueError, "key.shape[0]", **one, actual_seq_kvlen=[0, 0], block_table=None)

    def test_query_tokens_fit(self):
        self.accepted(tokens=3, actual_seq_qlen=[3, 0])
        self.refused(ArgumentValueError, "max(actual_seq_qlen)", tokens=3, actual_seq_qlen=[4, 0])
        assert "at index 1" in self.refused(
            ArgumentValueError, "actual_seq_qlen", tokens=3, actual_seq_qlen=[1, 3], actual_seq_kvlen=[40, 2]
        )
        self.accepted(tokens=3, actual_seq_kvlen=[40, 2])  # not given, not checked: the first query token sees nothing
        packed = self.packed(3) | {"layout": "TND"}
        self.accepted(**packed, actual_seq_qlen=[2, 1])
        self.refused(ArgumentValueError, "sum(actual_seq_qlen)", **packed, actual_seq_qlen=[2, 2])
        self.refused(ArgumentValueError, "query.shape[0]", **packed)
        three = self.accepted(**packed, block_table=None, actual_seq_kvlen=[40] * 3, actual_seq_qlen=None)
        assert three.shape == (3, 4, 8)

    def test_types_are_checked_before_values(self):
        self.refused(ArgumentTypeError, "page_block_size", **self.bad_number, page_block_size=None)
        self.refused(ArgumentTypeError, "actual_seq_kvlen", **self.bad_number, actual_seq_kvlen=None)
        self.refused(ArgumentTypeError, "key.dtype", **self.bad_number, key=torch.zeros(8, 32, 2, 16).half())

    def test_the_registered_operator_checks_by_itself(self):
        assert self.operator()[0].shape == (2, 4, 8)
        ints = torch.int32
        rows = torch.zeros(2, 2, dtype=ints)
        assert self.operator(rows=rows)[0].shape == (2, 4, 8)
        empty = self.operator(rows=rows, **self.packed(0))
        assert [part.shape for part in empty] == [(0, 4, 8), (0, 4)]
        bad: list[dict[str, Any]] = [
            self.packed(3),
            self.packed(0),
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
            self.bad_number,
            {"impl": "fast"},
            *self.bad_parts,
        ]
        for changes in bad:
            with pytest.raises((ArgumentValueError, ArgumentTypeError)):
                self.operator(**changes)

    @pytest.mark.usefixtures("checking_indices")
    def test_checked_lengths_fit_the_block_table(self):
        self.operator()
        for lengths in ([40, 129], [40, -1]):
            with pytest.raises(ArgumentValueError, match=r"actual_seq_kvlen\[1\]: expected an index from 0 to 128"):
                self.operator(lengths=torch.tensor(lengths, dtype=torch.int32))

    @pytest.mark.usefixtures("checking_indices")
    def test_checked_rows_are_rows_of_the_query(self):
        for rows in ([[0, 1], [1, 2]], [[0, 1], [3, 1]], [[0, 1], [1, -1]]):
            with pytest.raises(ArgumentValueError, match=r"actual_seq_qlen\[1\]: expected an index from 0"):
                self.operator(rows=torch.tensor(rows, dtype=torch.int32))

    def test_random_and_garbage_calls_work_or_raise_a_named_error(self):
        rng = Random(20)

        def random_call():
            call = self.calls.arguments(**random_sizes(rng), **self.own_sizes(rng))
            return with_garbage(at_random(call, list(self.packed(1)), rng), rng)

        assert 100 < sum(succeeds(self.calls.function, random_call()) for _ in range(1500)) < 1400
