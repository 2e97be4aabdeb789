"""Length lists as the vendor's operators take them, as tuples of ints."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError

_EXPECTED = "a list or tuple of ints, a numpy integer array, or a 1-D integer tensor on the CPU"
INTEGER_DTYPES = frozenset({torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8})


def host_ints(lengths: Any, argument: str) -> tuple[int, ...]:
    """The entries of any accepted kind of length list, unchecked."""
    if isinstance(lengths, (list, tuple)):
        entries = tuple(lengths)
        # One pass in C for the usual case; bool is no int here, and 1.0 == 1 must not find the cache entry of 1.
        return entries if set(map(type, entries)) <= {int} else tuple(_as_int(entry, argument) for entry in entries)
    if isinstance(lengths, torch.Tensor):
        return _tensor_ints(lengths, argument)
    if isinstance(lengths, np.ndarray):
        if lengths.dtype.kind not in "iu":
            raise ArgumentTypeError(argument, _EXPECTED, f"a numpy array of {lengths.dtype}")
        if lengths.ndim != 1:
            raise ArgumentValueError(argument, _EXPECTED, f"a numpy array of shape {lengths.shape}")
        return tuple(lengths.tolist())
    raise ArgumentTypeError(argument, _EXPECTED, type(lengths).__name__, "It is required" if lengths is None else "")


def _as_int(entry: Any, argument: str) -> int:
    if isinstance(entry, bool) or not isinstance(entry, (int, np.integer)):
        raise ArgumentTypeError(argument, _EXPECTED, f"an entry {entry!r} of type {type(entry).__name__}")
    return int(entry)


def _tensor_ints(lengths: torch.Tensor, argument: str) -> tuple[int, ...]:
    if lengths.dtype not in INTEGER_DTYPES:
        raise ArgumentTypeError(argument, _EXPECTED, f"a tensor of {lengths.dtype}")
    if lengths.device.type != "cpu":
        raise ArgumentValueError(
            argument,
            _EXPECTED,
            f"a tensor on {lengths.device}",
            "The number of output rows depends on its values, and reading them back would stall the device. "
            "Keep the lengths on the host, or call .tolist() once, outside of the training loop",
        )
    if lengths.dim() != 1:
        raise ArgumentValueError(argument, _EXPECTED, f"a tensor of shape {tuple(lengths.shape)}")
    return tuple(lengths.tolist())


def check_prefix_ends(ends: tuple[int, ...], argument: str, leading_zero: bool) -> None:
    """Check inclusive prefix sums (s0, s0 + s1, ...): where each segment ends. A repeated value is an empty segment.

    `leading_zero` says whether the first segment may be empty too.
    """
    if not ends:
        raise ArgumentValueError(argument, "at least one entry", "an empty list", "One segment of T tokens is [T]")
    lowest = 0 if leading_zero else 1
    if ends[0] < lowest:
        hint = (
            "Leave out empty segments at the front, or call the npu_ spelling, which takes them" if ends[0] == 0 else ""
        )
        raise ArgumentValueError(argument, f"prefix sums, each at least {lowest}", f"{ends[0]} at index 0", hint)
    for index in range(1, len(ends)):
        if ends[index] < ends[index - 1]:
            raise ArgumentValueError(
                argument,
                "prefix sums that never decrease",
                f"{ends[index - 1]} then {ends[index]} at index {index}",
                "Segment lengths s0, s1, ... are passed as s0, s0 + s1, ... (itertools.accumulate)",
            )


def on_device(lengths: Any) -> bool:
    """Whether its entries are where the host cannot look at them without waiting for the device."""
    return isinstance(lengths, torch.Tensor) and lengths.device.type != "cpu"


def read_once(lengths: Any, argument: str) -> Any:
    """Lengths on the host as a tuple of ints, which is cheap to look at again; None and tensors on the device as is."""
    return lengths if lengths is None or on_device(lengths) else host_ints(lengths, argument)


def batch_lengths(lengths: Any, argument: str, batch: int, device: torch.device) -> torch.Tensor:
    """One length per batch as an int32 tensor [B] on `device`; a tensor that is there already is not read.

    Lengths on the host are checked here, and their tensor is cached by value: the layers of a model share one copy.
    """
    if on_device(lengths):
        return _lengths_on_device(lengths, argument, batch, device)
    if torch.compiler.is_compiling():  # checked by the registered operator as far as shapes go
        if isinstance(lengths, (list, tuple)):  # as_tensor would make a new graph for every list
            return torch.tensor(lengths, dtype=torch.int32, device=device)
        return torch.as_tensor(lengths, dtype=torch.int32).to(device)
    values = host_ints(lengths, argument)
    check_batch_lengths(values, argument, batch)
    return int32_tensor(values, device)


def check_batch_lengths(values: tuple[int, ...], argument: str, batch: int) -> None:
    if len(values) != batch:
        expected = f"{batch} lengths, one per batch"
        raise ArgumentValueError(argument, expected, f"{len(values)} entries", "They are lengths, not prefix sums")
    for index, value in enumerate(values):
        if value < 0:
            raise ArgumentValueError(argument, "lengths of at least 0", f"{value} at index {index}")
        if value >= 2**31:
            raise ArgumentValueError(argument, "lengths below 2^31", f"{value} at index {index}")


def _lengths_on_device(lengths: torch.Tensor, argument: str, batch: int, device: torch.device) -> torch.Tensor:
    if lengths.dtype not in INTEGER_DTYPES:
        raise ArgumentTypeError(argument, "an integer tensor", f"a tensor of {lengths.dtype}")
    if lengths.device != device:
        expected = f"a tensor on {device}, or lengths on the host"
        raise ArgumentValueError(argument, expected, f"a tensor on {lengths.device}")
    if tuple(lengths.shape) != (batch,):
        raise ArgumentValueError(argument, f"shape [{batch}], one length per batch", f"shape {list(lengths.shape)}")
    return lengths.to(torch.int32)


def int32_tensor(values: Any, device: torch.device) -> torch.Tensor:
    """A tensor of nested tuples of ints, cached by value."""
    if _get_current_dispatch_mode() is not None:  # a fake tensor, or one of a trace, must not outlive its mode
        return _int32_tensor.__wrapped__(values, device)
    return _int32_tensor(values, device)


@functools.lru_cache(maxsize=64)
def _int32_tensor(values: Any, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
