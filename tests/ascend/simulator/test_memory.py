"""Memories, the views through which instructions read and write them, and conversions, against bytes and torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsa_triton.ascend.simulator.faults import OutOfBoundsError
from nsa_triton.ascend.simulator.memory import (
    BITS,
    DTYPES,
    Memory,
    View,
    cast,
    from_bf16,
    from_fractals,
    row_major,
    to_bf16,
    to_fractals,
)

SIZE = 256
WIDE = sorted(set(DTYPES) - {"bf16"})  # whose elements are read as the numbers that their bytes hold


def memory(data: bytes | None = None) -> Memory:
    values = np.arange(SIZE, dtype=np.uint8) if data is None else np.frombuffer(data, np.uint8).copy()
    return Memory("UB", "UB", values)


def indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def bit_of(view: View, index: Sequence[int]) -> int:
    """Where an element begins in its memory, by the definition of a strided view."""
    elements = sum(i * stride for i, stride in zip(index, view.strides, strict=True))
    return view.offset + elements * BITS[view.dtype]


def as_number(data: np.ndarray) -> int:
    """A whole memory as one number, bit 0 being the first."""
    return int.from_bytes(data.tobytes(), "little")


@st.composite
def views(draw: st.DrawFn, dtypes: Sequence[str]) -> View:
    """A view without overlaps: axes in any order, gaps between rows, an offset."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    order = draw(st.permutations(range(len(shape))))
    strides, step = [0] * len(shape), draw(st.integers(1, 3))
    for axis in order:
        strides[axis] = step
        step *= max(1, shape[axis]) + draw(st.integers(0, 2))
    unit = 1 if dtype == "i1" else BITS[dtype]
    view = View(memory(draw(st.binary(min_size=SIZE, max_size=SIZE))), dtype, 0, shape, strides)
    room = SIZE * 8 - view.extent * BITS[dtype]
    if room < 0:  # too many wide elements
        return View(view.memory, dtype, 0, ())
    view.offset = draw(st.integers(0, room // unit)) * unit
    return view


# ---- where a view reads and writes -----------------------------------------------------------------------------------


@given(views(WIDE))
def test_a_view_reads_the_bytes_at_its_strides(view: View) -> None:
    data, size, kind = view.memory.data.tobytes(), BITS[view.dtype] // 8, np.dtype(DTYPES[view.dtype])
    found = view.read()
    assert found.shape == view.shape
    for index in indices(view.shape):
        first = bit_of(view, index) // 8
        assert found[index].tobytes() == data[first : first + size]
    assert found.dtype == kind


@given(views(WIDE), st.integers(-100, 100))
def test_a_view_writes_its_elements_and_nothing_else(view: View, start: int) -> None:
    before = view.memory.data.copy()
    values = {index: start + i for i, index in enumerate(indices(view.shape))}
    view.write(np.array([*values.values()]).reshape(view.shape))
    expected, size = bytearray(before.tobytes()), BITS[view.dtype] // 8
    for index, value in values.items():
        first = bit_of(view, index) // 8
        expected[first : first + size] = np.array(value).astype(DTYPES[view.dtype]).tobytes()
    assert view.memory.data.tobytes() == bytes(expected)


@given(views(["i1"]), st.data())
def test_bits_have_offsets_and_strides_of_their_own(view: View, data: st.DataObject) -> None:
    before = as_number(view.memory.data)
    found = view.read()
    assert {index: bool(found[index]) for index in indices(view.shape)} == {
        index: bool(before >> bit_of(view, index) & 1) for index in indices(view.shape)
    }
    written = data.draw(st.lists(st.booleans(), min_size=view.size, max_size=view.size))
    view.write(np.array(written, bool).reshape(view.shape))
    expected = before
    for index, value in zip(indices(view.shape), written, strict=True):
        bit = bit_of(view, index)
        expected = expected & ~(1 << bit) | int(value) << bit
    assert as_number(view.memory.data) == expected  # the neighbours in the same bytes among them


def test_rows_of_bits_lie_32_bytes_apart() -> None:
    target = memory(bytes(SIZE))
    View(target, "i1", 8 * 32, (2, 10), (256, 1)).write(True)
    assert target.data[32:34].tolist() == target.data[64:66].tolist() == [0xFF, 0x03]
    assert np.count_nonzero(target.data) == 4


def test_one_value_fills_a_view() -> None:
    target = memory(bytes(SIZE))
    View(target, "i16", 0, (2, 3), (8, 1)).write(-2)
    assert View(target, "i16", 0, (16,)).read().tolist() == [-2] * 3 + [0] * 5 + [-2] * 3 + [0] * 5


def test_what_nobody_wrote_is_nan() -> None:
    fresh = Memory.on_chip("L0C", 64)
    assert (fresh.name, fresh.kind) == ("L0C", "L0C")
    for dtype in ("f32", "f16", "bf16"):
        assert np.isnan(View(fresh, dtype, 0, (8,)).read()).all()


def test_a_read_is_a_copy() -> None:
    view = View(memory(), "i32", 0, (4,))
    found = view.read()
    view.write(0)
    assert found.tolist() == [0x03020100, 0x07060504, 0x0B0A0908, 0x0F0E0D0C]


# ---- sizes and bounds ------------------------------------------------------------------------------------------------


def test_sizes_of_a_view() -> None:
    view = View(memory(), "f16", 16, (2, 3), (16, 1))
    assert (view.size, view.bytes, view.extent, view.byte_range()) == (6, 12, 19, (2, 40))
    bits = View(memory(), "i1", 4, (2, 3), (16, 1))
    assert (bits.bytes, bits.extent, bits.byte_range()) == (1, 19, (0, 3))
    further = view.at(5, (4,), (2,))
    assert (further.memory, further.offset, further.shape, further.strides) == (view.memory, 16 + 5 * 16, (4,), (2,))
    assert row_major((2, 3, 4)) == (12, 4, 1)
    assert View(memory(), "f32", 0, (2, 3, 4)).strides == (12, 4, 1)
    assert (row_major(()), View(memory(), "f32", 0, ()).size) == ((), 1)


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_the_last_element_is_the_bound(dtype: str, shape: tuple[int, ...]) -> None:
    strides = (3,) if len(shape) == 1 else (6, 3)
    last = 8 * SIZE - 9 * BITS[dtype]  # of the fourth element, nine after the first
    inside = View(memory(), dtype, last - BITS[dtype], shape, strides)
    assert inside.read().shape == shape
    inside.write(1)
    one_byte = 8 if dtype == "i1" else BITS[dtype]
    for offset in (last - BITS[dtype] + one_byte, -one_byte):
        outside = View(memory(), dtype, offset, shape, strides)
        before = outside.memory.data.copy()
        with pytest.raises(OutOfBoundsError, match="UB, which has 256"):
            outside.read()
        with pytest.raises(OutOfBoundsError, match="UB, which has 256"):
            outside.write(1)
        assert outside.memory.data.tolist() == before.tolist()


def test_a_view_may_leave_its_memory_until_it_is_touched() -> None:
    tile = View(memory(), "f32", 8 * 128, (64, 64))
    tile.at(0, (2, 2), tile.strides)
    with pytest.raises(OutOfBoundsError, match="bytes 128 to 16512 of UB"):
        tile.read()
    assert tile.at(0, (1, 32), tile.strides).read().shape == (1, 32)


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_an_empty_view_touches_nothing_wherever_it_is(dtype: str, shape: tuple[int, ...]) -> None:
    view = View(memory(), dtype, 8 << 40, shape)
    before = view.memory.data.copy()
    assert view.read().shape == shape
    view.write(1)
    assert (view.size, view.bytes, view.extent) == (0, 0, 0)
    assert view.memory.data.tolist() == before.tolist()


# ---- conversions -----------------------------------------------------------------------------------------------------

HIGH = np.arange(1 << 16, dtype=np.uint32) << 16


@pytest.mark.parametrize("low", [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])  # 0x8000: exactly between two numbers
def test_bf16_rounds_as_torch_does(low: int) -> None:
    values = (HIGH | np.uint32(low)).view(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = to_bf16(values)
    is_nan = np.isnan(values)
    assert found[~is_nan].tolist() == expected[~is_nan].tolist()
    assert np.isnan(from_bf16(found[is_nan])).all()


def test_bf16_by_hand() -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 3.4e38, -np.inf, np.nan], np.float32)
    assert from_bf16(to_bf16(ties))[:3].tolist() == [1.0, 1 + 2**-6, -1.0]  # to the even one
    assert from_bf16(to_bf16(ties))[3:5].tolist() == [math.inf, -math.inf]
    assert to_bf16(ties)[5] == 0x7FC0
    assert to_bf16(np.array(1.5, np.float32)).shape == ()
    assert to_bf16(np.ones((2, 3), np.float32).T).shape == (3, 2)


def test_every_bf16_number_keeps_its_bits() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(patterns.view(np.int16)).view(torch.bfloat16).float().numpy()
    numbers = from_bf16(patterns)
    assert np.array_equal(numbers, expected, equal_nan=True)
    is_number = ~np.isnan(numbers)
    assert to_bf16(numbers)[is_number].tolist() == patterns[is_number].tolist()


def test_a_bf16_view_holds_patterns_and_reads_numbers() -> None:
    view = View(memory(), "bf16", 0, (3,))
    view.write(np.array([1.0, -2.0, 1 + 2**-8], np.float32))
    assert view.raw().tolist() == [0x3F80, 0xC000, 0x3F80]
    assert view.read().tolist() == [1.0, -2.0, 1.0]
    assert view.read().dtype == np.float32


def nearest(value: float) -> int:
    """The integer nearest to `value`, halves to the even one."""
    below = math.floor(value)
    rest = value - below
    return below + (rest > 0.5 or (rest == 0.5 and below % 2 == 1))


MODES: dict[str, Callable[[float], int]] = {"rint": nearest, "trunc": int, "floor": math.floor, "ceil": math.ceil}


@pytest.mark.parametrize("mode", sorted(MODES))
@given(value=st.one_of(st.floats(width=32, allow_nan=False), st.integers(-40, 40).map(lambda n: n / 2)))
def test_floats_become_integers_and_saturate(mode: str, value: float) -> None:
    for dtype, bits in (("i8", 8), ("i16", 16), ("i32", 32)):
        most = (1 << bits - 1) - 1
        bounded = min(max(value, -(2.0**40)), 2.0**40)  # infinities have no integer
        expected = min(max(MODES[mode](bounded), -most - 1), most)
        assert int(cast(np.float32(value), dtype, mode)) == expected


def test_nan_becomes_the_integer_zero() -> None:
    assert cast(np.array([np.nan, 1.0], np.float32), "i32").tolist() == [0, 1]


def test_int64_saturates_too() -> None:
    found = cast(np.array([1e30, -1e30, np.inf, 5.0], np.float32), "i64").tolist()
    assert found[1:] == [-(1 << 63), found[0], 5]
    assert found[0] > 1 << 62


@given(st.floats(width=32))
def test_floats_become_halves_as_in_torch(value: float) -> None:
    expected = torch.tensor(value, dtype=torch.float32).half().numpy()
    assert np.array_equal(cast(np.float32(value), "f16"), expected, equal_nan=True)  # ties, denormals, overflow to inf


def test_integers_become_floats() -> None:
    assert cast(np.array([3, -(1 << 24) - 1], np.int32), "f32").tolist() == [3.0, -(2.0**24)]
    assert cast(np.array([True, False]), "f16").tolist() == [1.0, 0.0]


# ---- fractals --------------------------------------------------------------------------------------------------------


@given(*(st.integers(1, 4) for _ in range(2)), st.sampled_from([2, 16]), st.sampled_from([4, 8, 16]))
def test_fractals_lie_column_by_column(rows: int, columns: int, height: int, width: int) -> None:
    matrix = np.arange(rows * height * columns * width).reshape(rows * height, columns * width)
    blocks = to_fractals(matrix, (columns, rows, height, width))
    assert blocks.shape == (columns, rows, height, width)
    for r, c in indices(matrix.shape):
        assert blocks[c // width, r // height, r % height, c % width] == matrix[r, c]
    assert from_fractals(blocks).tolist() == matrix.tolist()
