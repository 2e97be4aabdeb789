"""Checks of single arguments that every operator needs."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, NamedTuple

import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.ops._common.block_scores import IMPORTANCES


class Meta(NamedTuple):
    """What checks look at of a tensor; hashable, so that a check is made once for each kind of call."""

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Meta:
        return cls(tensor.dtype, tensor.device, tensor.shape)


def check_tensor(argument: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(argument, "a torch.Tensor", type(value).__name__)
    if value.layout is not torch.strided:
        raise ArgumentTypeError(argument, "a dense tensor", f"layout {value.layout}", "Call .to_dense()")


def check_bool(argument: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(argument, "a bool", f"{value!r} of type {type(value).__name__}")


def check_int(argument: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(argument, "an int", f"{value!r} of type {type(value).__name__}")
    if not -(2**31) <= value < 2**31:
        raise ArgumentValueError(argument, "an int of 32 bits", value)


def check_scale(argument: str, value: Any) -> None:
    """A finite real number; those of numpy are welcome."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(argument, "a real number", f"{value!r} of type {type(value).__name__}")
    try:
        is_finite = math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        is_finite = False
    if not is_finite:
        raise ArgumentValueError(argument, "a finite number", value)


def check_importance(importance: Any) -> None:
    if not isinstance(importance, str):
        raise ArgumentTypeError("importance", f"one of {', '.join(IMPORTANCES)}", type(importance).__name__)
    if importance not in IMPORTANCES:
        raise ArgumentValueError("importance", f"one of {', '.join(IMPORTANCES)}", repr(importance))


def check_rank(argument: str, meta: Meta, dimensions: str) -> None:
    """`dimensions` names them, as in "[T, N, D]"."""
    rank = dimensions.count(",") + 1
    if len(meta.shape) != rank:
        raise ArgumentValueError(argument, f"{rank} dimensions {dimensions}", f"shape {list(meta.shape)}")


def check_size(argument: str, meta: Meta, dimension: int, size: int, why: str) -> None:
    if meta.shape[dimension] != size:
        raise ArgumentValueError(f"{argument}.shape[{dimension}]", f"{size}, {why}", meta.shape[dimension])


def check_same_dtype(argument: str, meta: Meta, other: str, like: Meta) -> None:
    if meta.dtype != like.dtype:
        expected = f"{like.dtype}, the dtype of {other}"
        raise ArgumentTypeError(f"{argument}.dtype", expected, meta.dtype, "Convert one of them with .to(dtype)")


def check_same_device(argument: str, meta: Meta, other: str, like: Meta) -> None:
    if meta.device != like.device:
        expected = f"{like.device}, the device of {other}"
        raise ArgumentValueError(f"{argument}.device", expected, meta.device, "Move one of them with .to(device)")
