"""Validation of the attention ops on ragged batches, and of their gradients: what all of them refuse and take."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from tests.ops.calls import Calls, Validation, succeeds, with_garbage


class RaggedCalls(Calls):
    """Of a forward function and, where `gradient` is among the sizes, of its gradient."""

    def refused_twice(self, error: Any, argument: str, **changes: Any) -> str:
        """By the forward function and by the gradient."""
        self.refused(error, argument, gradient=True, **changes)
        return self.refused(error, argument, **changes)


def either(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """The function that the arguments are for."""
    return lambda **call: backward(**call) if "grad" in call else forward(**call)


def ragged_arguments(
    *,
    queries=(2, 1),
    keys=(40, 20),
    heads=4,
    kv_heads=2,
    key_dim=16,
    value_dim=8,
    dtype=torch.float32,
    gradient=False,
    **changes,
) -> dict[str, Any]:
    """What legal calls of all these ops have; `changes` replace arguments or add some. A gradient needs statistics."""
    count, tokens = sum(queries), sum(keys)
    legal = {
        "query": torch.zeros(count, heads, key_dim, dtype=dtype),
        "key": torch.zeros(tokens, kv_heads, key_dim, dtype=dtype),
        "value": torch.zeros(tokens, kv_heads, value_dim, dtype=dtype),
        "scale_value": 0.5,
        "head_num": heads,
        "actual_seq_qlen": list(accumulate(queries)),
        "actual_seq_kvlen": list(accumulate(keys)),
        "impl": "reference",
    }
    if gradient:
        legal |= {name: torch.zeros(count, heads, value_dim, dtype=dtype) for name in ("grad", "attention_out")}
    return legal | changes


def ragged_parts(call: dict[str, Any]) -> dict[str, Any]:
    """The legal call as arguments of the registered operators."""
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    return tensors | {"query_ends": [2, 3], "key_ends": [40, 60], "scale": 0.5, "impl": "reference"}


# argument in messages; sizes that change together; legal and illegal values
RAGGED_LIMITS: list[Any] = [
    ("query.shape[2] (Dk)", "key_dim", [1, 7, 192, 300], [0]),
    ("value.shape[2] (Dv)", "value_dim", [1, 7, 128, 300], [0]),
    ("key.shape[1] (N2)", "kv_heads", [1, 4], [0]),
    ("actual_seq_kvlen", "queries", [(2, 0), (0, 0), (0, 5)], [(2, 1, 1), (3,)]),
]

BAD_TYPES: list[Any] = [
    None, 60, 60.0, "60", {60}, iter([60]), [40.0, 60], [True, 60], ["40", 60], [None, 60], [[40], [60]],
    np.array([60.0]), np.array([True]), torch.tensor([60.0]), torch.tensor([True]),
]  # fmt: skip


def random_sizes(rng: Random) -> dict[str, Any]:
    segments = rng.choice([1, 2, 3])
    return {
        "queries": [rng.choice([0, 1, 2]) for _ in range(segments)],
        "keys": [rng.choice([0, 1, 20, 33]) for _ in range(segments)],
        "kv_heads": rng.choice([1, 2]),
        "heads": rng.choice([2, 4, 6]),
        "key_dim": rng.choice([16, 5]),
        "gradient": rng.random() < 0.5,
    }


def at_random(call: dict[str, Any], rng: Random) -> dict[str, Any]:
    """A legal call with any kind of lengths, and sometimes with a tensor of another shape or dtype."""
    kind: Any = rng.choice([list, tuple, np.asarray, torch.as_tensor])
    call |= {name: kind(call[name]) for name in ("actual_seq_qlen", "actual_seq_kvlen")}
    if rng.random() < 0.2:
        name = rng.choice([name for name, value in call.items() if isinstance(value, torch.Tensor) and value.dim() > 1])
        shape = list(call[name].shape)
        shape[rng.randrange(len(shape))] += 1
        call[name] = torch.zeros(shape, dtype=rng.choice([call[name].dtype, torch.float16, torch.int64]))
    return call


class RaggedValidation(Validation):
    """An op says how it is called and inherits these tests."""

    calls: ClassVar[RaggedCalls]
    operator: ClassVar[Callable[..., Any]]  # operator(gradient, **changes) of ragged_parts()
    statistics: ClassVar[tuple[str, ...]]  # tensors of float32 that the gradient takes
    bad_number: ClassVar[dict[str, Any]]  # an argument of functions and operators alike, of a type that is right
    bad_parts: ClassVar[list[dict[str, Any]]] = []  # what else both operators refuse
    bad_statistics: ClassVar[dict[str, Any]]  # what the gradient operator refuses

    def own_sizes(self, rng: Random) -> dict[str, Any]:
        """The sizes that this op has besides random_sizes()."""
        raise NotImplementedError

    def refused_by_all(self, error: Any, argument: str, **changes: Any) -> str:
        return self.calls.refused_twice(error, argument, **changes)

    def test_tensors_agree(self):
        given = self.calls.arguments(gradient=True)
        for name in ("key", "value", "grad", "attention_out"):
            changes = {name: given[name].half()}
            assert "float32" in self.refused(ArgumentTypeError, f"{name}.dtype", gradient=True, **changes)
        for name in self.statistics:
            changes = {"dtype": torch.float16, name: given[name].half()}
            assert "torch.float32" in self.refused(ArgumentTypeError, f"{name}.dtype", gradient=True, **changes)
        for name in given:
            if isinstance(given[name], torch.Tensor) and name != "query":
                changes = {name: given[name].to("meta")}
                assert "meta" in self.refused(ArgumentValueError, f"{name}.device", gradient=True, **changes)

    def test_shapes_agree(self):
        zeros, given = torch.zeros, self.calls.arguments(gradient=True)
        self.refused_by_all(ArgumentValueError, "value.shape[0]", value=zeros(59, 2, 8))
        self.refused_by_all(ArgumentValueError, "value.shape[1]", value=zeros(60, 1, 8))
        self.refused_by_all(ArgumentValueError, "key.shape[2]", key=zeros(60, 2, 8))
        for name in ("grad", "attention_out", *self.statistics):
            shape = list(given[name].shape)
            for dimension in range(len(shape)):
                wrong = list(shape)
                wrong[dimension] += 1
                message = self.refused(ArgumentValueError, f"{name}.shape", gradient=True, **{name: zeros(wrong)})
                assert str(shape) in message

    def test_triton_does_not_compute_in_float64(self):
        for gradient in (False, True):
            with pytest.raises(ArgumentTypeError, match=r"query\.dtype.*reference"):
                self.accepted(dtype=torch.float64, impl="triton", gradient=gradient)

    def test_the_number_of_heads_is_that_of_the_queries(self):
        for value in (3, 8, 0, -4, 2**70):
            self.refused_by_all(ArgumentValueError, "head_num", head_num=value)

    @pytest.mark.parametrize("argument", ["actual_seq_kvlen", "actual_seq_qlen"])
    @pytest.mark.parametrize("lengths", BAD_TYPES, ids=repr)
    def test_lengths_of_a_wrong_type(self, argument, lengths):
        self.refused_by_all(ArgumentTypeError, argument, **{argument: lengths})

    @pytest.mark.parametrize(
        "lengths",
        [[], [-1, 3], [3, 2], [0, 3, 2], np.array([[1, 3]]), np.array(3), torch.tensor([[1, 3]]), torch.tensor(3)],
        ids=repr,
    )
    def test_lengths_of_a_wrong_value(self, lengths):
        for argument in ("actual_seq_qlen", "actual_seq_kvlen"):
            self.refused_by_all(ArgumentValueError, argument, **{argument: lengths})

    def test_lengths_are_prefix_sums_within_the_tensors(self):
        assert "T1 = 3" in self.refused_by_all(ArgumentValueError, "actual_seq_qlen[-1]", actual_seq_qlen=[2, 4])
        assert "T2 = 60" in self.refused_by_all(ArgumentValueError, "actual_seq_kvlen[-1]", actual_seq_kvlen=[40, 61])
        self.refused_by_all(ArgumentValueError, "actual_seq_kvlen[-1]", actual_seq_kvlen=[40, 2**40])
        self.accepted(actual_seq_qlen=[0, 2], actual_seq_kvlen=[0, 59])
        assert "2 entries" in self.refused_by_all(ArgumentValueError, "actual_seq_kvlen", actual_seq_kvlen=[60])
        on_device = torch.zeros(2, dtype=torch.int64, device="meta")
        for argument in ("actual_seq_qlen", "actual_seq_kvlen"):
            assert "on the CPU" in self.refused_by_all(ArgumentValueError, argument, **{argument: on_device})

    def test_types_are_checked_before_values(self):
        self.refused_by_all(ArgumentTypeError, "head_num", **self.bad_number, head_num=None)
        self.refused_by_all(ArgumentTypeError, "actual_seq_kvlen", **self.bad_number, actual_seq_kvlen=None)
        self.refused_by_all(ArgumentTypeError, "key.dtype", **self.bad_number, key=torch.zeros(60, 2, 16).half())

    @pytest.mark.parametrize("gradient", [False, True])
    def test_the_registered_operators_check_by_themselves(self, gradient):
        assert self.operator(gradient)[0].shape == (3, 4, 16 if gradient else 8)
        bad: list[dict[str, Any]] = [
            {"query": torch.zeros(3, 3, 16)},
            {"key": torch.zeros(60, 2, 8)},
            {"value": torch.zeros(59, 2, 8)},
            {"query_ends": [2, 4]},
            {"query_ends": [3]},
            {"query_ends": []},
            {"key_ends": [60, 40]},
            {"impl": "fast"},
            self.bad_number,
            *self.bad_parts,
            *([{"grad": torch.zeros(3, 4, 9)}, self.bad_statistics] if gradient else []),
        ]
        for changes in bad:
            with pytest.raises((ArgumentValueError, ArgumentTypeError)):
                self.operator(gradient, **changes)

    def test_random_and_garbage_calls_work_or_raise_a_named_error(self):
        rng = Random(20)

        def random_call():
            call = self.calls.arguments(**random_sizes(rng), **self.own_sizes(rng))
            return with_garbage(at_random(call, rng), rng)

        assert 100 < sum(succeeds(self.calls.function, random_call()) for _ in range(1000)) < 900
