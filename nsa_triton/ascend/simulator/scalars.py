"""What translated scalar code calls: integer arithmetic as MLIR defines it, and views of buffers.

Integers are Python's, wrapped to their width where an op can leave it; i1 is 0 or 1. Floats are numpy's; a bfloat16
number is kept in a float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nsa_triton.ascend.simulator.memory import BITS, DTYPES, View, from_bf16, row_major
from nsa_triton.ascend.simulator.memory import to_bf16 as bf16_bits

to_f32, to_f16, to_f64 = np.float32, np.float16, np.float64
divide, maximum, minimum, fmax, fmin = np.divide, np.maximum, np.minimum, np.fmax, np.fmin
sqrt, exp, exp2, log, log2, absolute = np.sqrt, np.exp, np.exp2, np.log, np.log2, np.absolute


def to_bf16(value: Any) -> Any:
    return from_bf16(bf16_bits(np.asarray(value, np.float32))).reshape(())[()]


def wrap(value: int, bits: int) -> int:
    """The low `bits` of a number, as a signed one; one bit is 0 or 1."""
    if bits == 1:
        return value & 1
    half = 1 << bits - 1
    return (value + half & (1 << bits) - 1) - half


def unsigned(value: int, bits: int) -> int:
    return value & (1 << bits) - 1


def quotient(a: int, b: int) -> int:
    """Rounded towards zero."""
    return a // b if (a < 0) == (b < 0) else -(-a // b)


def remainder(a: int, b: int) -> int:
    return a - b * quotient(a, b)


def ceiling(a: int, b: int) -> int:
    return -(-a // b)


def bitcast(value: Any, source: str, target: str) -> Any:
    return DTYPES[source](value).view(DTYPES[target])


def reinterpret_cast(base: View, offsets: Sequence[int], sizes: Sequence[int], strides: Sequence[int]) -> View:
    """Counts from the start of the buffer; may exceed the tensor, as a subview narrows it before it is touched."""
    return View(base.memory, base.dtype, base.start + offsets[0] * BITS[base.dtype], sizes, strides, base.start)


def subview(
    base: View, offsets: Sequence[int], sizes: Sequence[int], strides: Sequence[int], kept: Sequence[int]
) -> View:
    start = sum(offset * stride for offset, stride in zip(offsets, base.strides, strict=True))
    return base.at(start, [sizes[axis] for axis in kept], [base.strides[axis] * strides[axis] for axis in kept])


def view(base: View, dtype: str, shift: int, sizes: Sequence[int]) -> View:
    """Bytes from `shift` on, as a tile."""
    return View(base.memory, dtype, base.offset + 8 * shift, sizes)


def collapse_shape(base: View, groups: Sequence[Sequence[int]]) -> View:
    strides = [
        next((base.strides[d] for d in reversed(group) if base.shape[d] != 1), base.strides[group[-1]])
        for group in groups
    ]
    sizes = [math.prod(base.shape[d] for d in group) for group in groups]
    return View(base.memory, base.dtype, base.offset, sizes, strides, base.start)


def expand_shape(base: View, groups: Sequence[Sequence[int]], sizes: Sequence[int]) -> View:
    strides = [
        step * base.strides[axis] for axis, group in enumerate(groups) for step in row_major([sizes[d] for d in group])
    ]
    return View(base.memory, base.dtype, base.offset, sizes, strides, base.start)


def metadata(base: View, rank: int) -> tuple[Any, ...]:
    """The buffer itself, the view's offset in it, sizes and strides."""
    buffer = View(base.memory, base.dtype, base.start, ())
    return (buffer, (base.offset - base.start) // BITS[base.dtype], *base.shape[:rank], *base.strides[:rank])
