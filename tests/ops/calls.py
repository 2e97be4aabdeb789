"""Calls of a public function that are accepted, refused, or drawn at random: what tests of validation are made of."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError, NsaError

GARBAGE = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "x", b"", [], {}, object(), torch.zeros(2), np.zeros(3), len]


class Calls(NamedTuple):
    function: Callable[..., Any]
    arguments: Callable[..., dict[str, Any]]  # those of a legal call, of the sizes and with the arguments it is given

    def accepted(self, **changes: Any) -> Any:
        return self.function(**self.arguments(**changes))

    def refused(self, error: type[NsaError], argument: str, **changes: Any) -> str:
        """The message of the error, which names the argument, what was expected and what came."""
        with pytest.raises(error) as caught:
            self.accepted(**changes)
        assert type(caught.value) is error
        assert str(caught.value).startswith(f"{argument}: expected "), caught.value
        assert ", got " in str(caught.value)
        return str(caught.value)


def with_garbage(call: dict[str, Any], rng: Random) -> dict[str, Any]:
    """The call with none, one or several of its arguments replaced."""
    while rng.random() < 0.2:
        call[rng.choice(list(call))] = rng.choice(GARBAGE)
    return call | {"impl": "reference"}


def succeeds(function: Callable[..., Any], call: dict[str, Any]) -> bool:
    """Whether a call returns; if it raises, then one of the errors of this package, with all its parts."""
    try:
        function(**call)
    except NsaError as error:
        return ": expected " not in str(error)
    return True


class Validation:
    """An op says how it is called and inherits these tests, with those of the ops that are like it."""

    calls: ClassVar[Any]  # Calls

    def accepted(self, **changes: Any) -> Any:
        return self.calls.accepted(**changes)

    def refused(self, error: Any, argument: str, **changes: Any) -> str:
        message: str = self.calls.refused(error, argument, **changes)
        return message

    def refused_by_all(self, error: Any, argument: str, **changes: Any) -> str:
        """By each function of the op."""
        return self.refused(error, argument, **changes)

    def test_scales_are_finite_real_numbers(self):
        value: Any
        for value in (None, "1", True, 1j, torch.tensor(1.0), [1.0], np.bool_(True)):
            self.refused_by_all(ArgumentTypeError, "scale_value", scale_value=value)
        for value in (float("nan"), float("inf"), -float("inf"), 10**400, np.float32("inf")):
            self.refused_by_all(ArgumentValueError, "scale_value", scale_value=value)
        for value in (0, -1, 1e-30, np.float32(0.5), np.float64(0.5), np.int32(2)):
            self.accepted(scale_value=value)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.int64])
    def test_dtypes_that_no_one_computes_in(self, dtype):
        self.refused_by_all(ArgumentTypeError, "query.dtype", dtype=dtype)

    def test_implementations(self):
        for value in ("cuda", ""):
            assert "auto, triton, reference" in self.refused_by_all(ArgumentValueError, "impl", impl=value)
        self.refused_by_all(ArgumentTypeError, "impl", impl=None)
