"""Memories as byte arrays, and the typed strided views through which every instruction reads and writes them.

Buffers lie at the addresses that the compiler's memory planner chose: where two that are alive overlap, one corrupts
the other here as it would on the chip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nsa_triton.ascend.simulator.faults import OutOfBoundsError

DTYPES: dict[str, Any] = {
    "f32": np.float32, "f16": np.float16, "bf16": np.uint16,
    "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
}  # fmt: skip
BITS: dict[str, int] = {name: np.dtype(kind).itemsize * 8 for name, kind in DTYPES.items()} | {"i1": 1}
BLOCK = 32  # bytes: the unit in which the chip addresses its unified buffer


class Memory:
    """A memory of a core, a tensor of the launch, or the workspace.

    `defined` marks the bytes that were written, `defined_bits` the elements of i1; both are kept only where a checker
    follows the values of the memory.
    """

    def __init__(self, name: str, kind: str, data: np.ndarray) -> None:
        self.name, self.kind, self.data = name, kind, data
        self.defined: np.ndarray | None = None
        self.defined_bits: np.ndarray | None = None

    def follow(self) -> None:
        self.defined = np.zeros(len(self.data), bool)
        self.defined_bits = np.zeros(8 * len(self.data), bool)

    @classmethod
    def on_chip(cls, name: str, size: int) -> Memory:
        """All bits set: floating-point numbers that nobody wrote are NaN."""
        return cls(name, name, np.full(size, 0xFF, np.uint8))


class View:
    """A memref: where it begins, in bits, then sizes and strides in elements.

    No byte is touched before an instruction reads or writes, because the compiler forms full tiles that reach out of
    bounds and narrows them afterwards.
    """

    __slots__ = ("dtype", "memory", "offset", "shape", "start", "strides")

    def __init__(
        self,
        memory: Memory,
        dtype: str,
        offset: int,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        start: int | None = None,
    ) -> None:
        self.memory, self.dtype, self.offset, self.shape = memory, dtype, offset, tuple(shape)
        self.strides = row_major(self.shape) if strides is None else tuple(strides)
        self.start = offset if start is None else start  # of the buffer that this is a view of

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return -(-self.size * BITS[self.dtype] // 8)

    @property
    def extent(self) -> int:
        """Elements from the first to the last one, gaps included."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else 1 + int(last)

    def at(self, elements: int, shape: Sequence[int] = (), strides: Sequence[int] = ()) -> View:
        """A view that begins `elements` further on."""
        return View(self.memory, self.dtype, self.offset + elements * BITS[self.dtype], shape, strides, self.start)

    def raw(self) -> np.ndarray:
        """The elements in place, bfloat16 as 16-bit patterns; not for i1, which has eight elements in a byte."""
        kind = np.dtype(DTYPES[self.dtype])
        if 0 in self.shape:  # an idle half of a tail tile; its address may lie outside
            return np.zeros(self.shape, kind)
        self.check_bounds()
        strides = [stride * kind.itemsize for stride in self.strides]
        return np.ndarray(self.shape, kind, self.memory.data, self.offset >> 3, strides)

    def read(self) -> np.ndarray:
        """The elements as numbers: i1 as booleans, bfloat16 as float32."""
        if self.dtype == "i1":
            return self._bits()[1]
        return from_bf16(self.raw()) if self.dtype == "bf16" else self.raw().copy()

    def write(self, value: Any) -> None:
        if self.dtype != "i1":
            self.raw()[...] = cast(value, self.dtype)
        elif 0 not in self.shape:
            bits, elements = self._bits()
            elements[...] = value
            first, last = self.byte_range()
            self.memory.data[first:last] = np.packbits(bits, bitorder="little")

    def _bits(self) -> tuple[np.ndarray, np.ndarray]:
        """All bits of the bytes that the view touches, and its own elements among them."""
        if 0 in self.shape:
            return np.zeros(0, np.uint8), np.zeros(self.shape, bool)
        self.check_bounds()
        first, last = self.byte_range()
        bits = np.unpackbits(self.memory.data[first:last], bitorder="little").view(bool)
        return bits, np.ndarray(self.shape, bool, bits, self.offset & 7, self.strides)

    def byte_range(self) -> tuple[int, int]:
        """The first byte and the one behind the last, gaps included."""
        return self.offset >> 3, self.offset + self.extent * BITS[self.dtype] + 7 >> 3

    def check_bounds(self) -> None:
        first, last = self.byte_range()
        if first < 0 or last > len(self.memory.data):
            raise OutOfBoundsError(self.memory.name, first, last, len(self.memory.data))


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(value: np.ndarray) -> np.ndarray:
    """To the nearest, ties to even."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FC0, rounded).astype(np.uint16).reshape(np.shape(value))


def cast(value: Any, dtype: str, rounding: str = "rint") -> np.ndarray:
    """Convert to `dtype`. Floats become integers by `rounding`, and saturate."""
    value = np.asarray(value)
    result: np.ndarray
    if dtype == "bf16":
        return to_bf16(value)
    if value.dtype.kind == "f" and dtype[0] == "i":
        limits = np.iinfo(DTYPES[dtype])
        most = np.nextafter(2.0**63, 0) if dtype == "i64" else limits.max  # 2^63 - 1 is no float64
        rounded = getattr(np, rounding)(value.astype(np.float64))
        result = np.clip(np.nan_to_num(rounded), limits.min, most).astype(DTYPES[dtype])
        return result
    with np.errstate(over="ignore"):
        result = value.astype(DTYPES[dtype], copy=False)
    return result


# Fractals: the cube reads matrices as [columns / C0, rows / 16, 16, C0], C0 elements being 32 bytes (16 in L0C).


def from_fractals(blocks: np.ndarray) -> np.ndarray:
    """[C1, R1, r, c] as a matrix [R1 * r, C1 * c]."""
    c1, r1, r, c = blocks.shape
    return blocks.transpose(1, 2, 0, 3).reshape(r1 * r, c1 * c)


def to_fractals(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    c1, r1, r, c = shape
    return matrix.reshape(r1, r, c1, c).transpose(2, 0, 1, 3)
