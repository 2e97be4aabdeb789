"""Tensors of indices: block tables, slots, block ids. Kernels clamp what they read; this is the mode that refuses."""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError
from nsa_triton.ops._common.arguments import Meta, check_rank, check_same_device
from nsa_triton.ops._common.lengths import INTEGER_DTYPES


def check_index_meta(argument: str, meta: Meta, dimensions: str, other: str, like: Meta) -> None:
    """An integer tensor of the given dimensions on the device of argument `other`."""
    if meta.dtype not in INTEGER_DTYPES:
        raise ArgumentTypeError(f"{argument}.dtype", "an integer dtype, best int32", meta.dtype, "Call .int()")
    check_same_device(argument, meta, other, like)
    check_rank(argument, meta, dimensions)


def as_int32(argument: str, indices: Tensor) -> Tensor:
    """The entries as int32. Those that int32 does not hold become -1 or its largest number, not some other index."""
    if indices.dtype not in INTEGER_DTYPES:
        raise ArgumentTypeError(f"{argument}.dtype", "an integer dtype, best int32", indices.dtype, "Call .int()")
    if indices.dtype is torch.int64:
        indices = indices.clamp(-1, 2**31 - 1)
    return indices.to(torch.int32)


def refuse_outside(argument: str, entries: Tensor, low: int, high: int | Tensor, read: Tensor, hint: str = "") -> None:
    """Raise at the first entry that is read and is not in [low, high). Reads the tensors back to the host.

    `read` is a bool tensor that broadcasts to `entries`, and `high` a number or a tensor that does.
    """
    entries = entries.long()
    bad = ((entries < low) | (entries >= high)) & read
    if bool(bad.any()):
        position = tuple(int(index) for index in bad.nonzero()[0])
        limit = int(torch.as_tensor(high).expand(entries.shape)[position]) if isinstance(high, Tensor) else high
        where = ", ".join(map(str, position))
        raise ArgumentValueError(
            f"{argument}[{where}]", f"an index from {low} to {limit - 1}", int(entries[position]), hint
        )


def refuse_repeated(argument: str, entries: Tensor, read: Tensor, hint: str = "") -> None:
    """Raise at the first entry that is read and equals one before it. Reads the tensors back to the host."""
    values, order = entries[read].sort(stable=True)
    repeated = order[1:][values[1:] == values[:-1]]
    if repeated.numel():
        position = tuple(read.nonzero()[repeated.min()].tolist())
        where = ", ".join(map(str, position))
        raise ArgumentValueError(f"{argument}[{where}]", "no index twice", int(entries[position]), hint)
