"""Every tile instruction against its definition: plain loops over Python's numbers, rounded once."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_triton.ascend.simulator.faults import OutOfBoundsError, UnknownInstructionError
from nsa_triton.ascend.simulator.instruction import Instruction
from nsa_triton.ascend.simulator.memory import DTYPES, Memory, View
from nsa_triton.ascend.simulator.tiles import accesses, check_modelled, execute

RNG = np.random.default_rng(0)
SIZE = 1 << 16  # bytes of a memory
NO_EVENTS = (-1, -1, -1, -1, 0, -1, -1)  # the last operands of a product


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Every test draws the same numbers, whichever tests ran before."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def made(name: str, *roles: int, **attributes: str | tuple[int, ...]) -> Instruction:
    """An instruction whose operands are cut into parts of these lengths; arrays of numbers are given as tuples."""
    parts = tuple(slice(a, b) for a, b in itertools.pairwise(itertools.accumulate(roles, initial=0)))
    texts = {key: str(value) for key, value in attributes.items()}
    numbers = {key: value for key, value in attributes.items() if isinstance(value, tuple)}
    return Instruction(0, name, "V", texts, parts, "k.py:1", numbers)


def tile(
    dtype: str,
    shape: Sequence[int],
    values: Any = None,
    *,
    strides: Sequence[int] | None = None,
    kind: str = "UB",
    at: int = 0,
    size: int = SIZE,
) -> View:
    """A tile in a memory of its own, `at` bytes from its beginning; every other byte is 0xFF."""
    view = View(Memory.on_chip(kind, size), dtype, 8 * at, shape, strides)
    if values is not None:
        view.write(np.asarray(values))
    return view


def beside(view: View, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None, at: int = 0) -> View:
    return View(view.memory, dtype, 8 * at, shape, strides)


def random(shape: Sequence[int], scale: float = 3.0) -> np.ndarray:
    return (RNG.standard_normal(shape) * scale).astype(np.float32)


def indices(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*map(range, shape))


def at(operand: Any, index: Sequence[int]) -> Any:
    """The element of an operand for an element of the result: a number is the same for all, axes of 1 repeat."""
    if not isinstance(operand, np.ndarray):
        return operand
    return operand[tuple(0 if size == 1 else i for i, size in zip(index, operand.shape, strict=True))].item()


def changed_bytes(view: View, run: Callable[[], None]) -> set[int]:
    """The bytes of a memory that an action changes, both if they were 0 and if they were 0xFF before."""
    changed = set()
    data = view.memory.data
    kept = data.copy()
    for fill in (0x00, 0xFF):
        data[...] = fill
        run()
        changed |= set(np.flatnonzero(data != fill).tolist())
        data[...] = kept
    return changed


# ---- elementwise -----------------------------------------------------------------------------------------------------

BINARY: dict[str, Callable[[float, float], float]] = {
    "vadd": operator.add, "vsub": operator.sub, "vmul": operator.mul, "vdiv": operator.truediv,
    "vmax": max, "vmin": min,
}  # fmt: skip
SHAPES = [
    ((5, 9), (5, 9)), ((5, 9), (5, 1)), ((5, 9), (1, 9)), ((5, 1), (1, 9)), ((3, 1, 8), (3, 4, 8)), ((7,), (7,)),
    ((7,), (1,)), ((3, 5), None), (None, (3, 5)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(BINARY))
def test_binary(name: str, shapes: tuple[tuple[int, ...] | None, ...]) -> None:
    """float64 holds every sum and product of two float32, so rounding its result once is the correct rounding."""
    inputs: list[Any] = [random(shape) if shape else np.float32(1.7) for shape in shapes]
    operands = [tile("f32", value.shape, value) if value.ndim else value for value in inputs]
    target = tile("f32", np.broadcast_shapes(*(shape or () for shape in shapes)))
    execute(made(name, 2, 1), [*operands, target])
    for index in indices(target.shape):
        a, b = (float(at(value, index)) for value in inputs)
        assert target.read()[index] == np.float32(BINARY[name](a, b))


UNARY: dict[str, tuple[Callable[[float], float], float]] = {  # and the error allowed: the hardware's is not published
    "vabs": (abs, 0), "vrelu": (lambda x: max(x, 0.0), 0), "vexp": (math.exp, 4e-7), "vln": (math.log, 4e-7),
    "vsqrt": (math.sqrt, 0), "vrec": (lambda x: 1 / x, 0), "vrsqrt": (lambda x: 1 / math.sqrt(x), 4e-7),
    "copy": (float, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(UNARY))
def test_unary(name: str) -> None:
    meaning, error = UNARY[name]
    x = random((6, 7))
    x = np.abs(x) + np.float32(0.01) if name in ("vln", "vsqrt", "vrsqrt") else x
    target = tile("f32", x.shape)
    execute(made(name, 1, 1), [tile("f32", x.shape, x, strides=(16, 1)), target])
    for index in indices(x.shape):
        expected = np.float32(meaning(float(x[index])))
        assert target.read()[index] == pytest.approx(expected, rel=error, abs=0)


INTEGERS: dict[str, Callable[[int, int], int]] = {
    "vadd": operator.add, "vsub": operator.sub, "vmul": operator.mul, "vmax": max, "vmin": min, "vand": operator.and_,
    "vor": operator.or_,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["i16", "i32"])
@pytest.mark.parametrize("name", sorted(INTEGERS))
def test_integers_wrap(name: str, dtype: str) -> None:
    bits = int(dtype[1:])
    most = (1 << bits - 1) - 1
    a, b = [most, -most - 1, 5, -7], [1, -1, -3, 2]
    target = tile(dtype, (4,))
    execute(made(name, 2, 1), [tile(dtype, (4,), a), tile(dtype, (4,), b), target])
    exact = [INTEGERS[name](x, y) for x, y in zip(a, b, strict=True)]
    assert target.read().tolist() == [(value + most + 1) % (1 << bits) - most - 1 for value in exact]


def test_shifts() -> None:
    a = tile("i32", (3,), [5, -8, 1])
    left, right = tile("i32", (3,)), tile("i32", (3,))
    execute(made("vshl", 2, 1), [a, 3, left])
    execute(made("vshr", 2, 1), [a, 1, right])
    assert left.read().tolist() == [40, -64, 8]
    assert right.read().tolist() == [2, -4, 0]


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_narrow_results_are_rounded_once(dtype: str) -> None:
    kind = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    x, y = (torch.from_numpy(random((40,))).to(kind) for _ in range(2))
    target = tile(dtype, (40,))
    execute(made("vadd", 2, 1), [tile(dtype, (40,), x.float()), tile(dtype, (40,), y.float()), target])
    assert target.read().tolist() == (x.double() + y.double()).to(kind).double().tolist()


def test_a_result_may_overlay_its_operands() -> None:
    x = random((64,))
    source = tile("f32", (64,), x)
    execute(made("vadd", 2, 1), [source, source, beside(source, "f32", (64,), at=4)])  # one element further on
    assert beside(source, "f32", (64,), at=4).read().tolist() == (2 * x).tolist()
    narrow = tile("f32", (64,), x)
    execute(made("vcast", 1, 1, round_mode="rint"), [narrow, beside(narrow, "f16", (64,))])
    assert beside(narrow, "f16", (64,)).read().tolist() == torch.from_numpy(x).half().tolist()


@pytest.mark.parametrize("name", ["vadd", "vbrc", "copy", "vsel"])
def test_only_the_target_is_written(name: str) -> None:
    target = tile("f32", (3, 5), strides=(8, 1), at=64)
    x, y = tile("f32", (3, 5), random((3, 5))), tile("f32", (3, 5), random((3, 5)))
    operands: list[Any] = {"vadd": [x, y], "vbrc": [x.at(0, (3, 1), (5, 1))], "copy": [x],
                           "vsel": [tile("i1", (3, 5), [[1, 0, 1, 0, 1]] * 3), x, y]}[name]  # fmt: skip
    run = made(name, len(operands), 1)
    expected = {64 + 32 * row + i for row in range(3) for i in range(20)}
    assert changed_bytes(target, lambda: execute(run, [*operands, target])) == expected


def test_broadcast() -> None:
    column, row = random((4, 1)), random((1, 6))
    target = tile("f32", (4, 6))
    execute(made("vbrc", 1, 1, 1), [tile("f32", (4, 1), column, strides=(8, 8)), target, tile("f32", (32,))])
    assert target.read().tolist() == [[value.item()] * 6 for value in column[:, 0]]
    execute(made("vbrc", 1, 1, 0), [tile("f32", (1, 6), row), target])
    assert target.read().tolist() == [row[0].tolist()] * 4
    execute(made("vbrc", 1, 1, 0), [np.float32(-2.5), target])
    assert target.read().tolist() == [[-2.5] * 6] * 4


def test_the_fill_of_l1_takes_a_number_of_16_bits() -> None:
    value = np.float32(1 + 2**-12)
    wide, half = tile("f32", (16,), kind="L1"), tile("f32", (16,), kind="UB")
    for target in (wide, half):
        execute(made("vbrc", 1, 1, 0), [value, target])
    assert wide.read().tolist() == [1.0] * 16
    assert half.read().tolist() == [1 + 2**-12] * 16


# ---- bits ------------------------------------------------------------------------------------------------------------

COMPARED: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f32", "f16", "i32"])
@pytest.mark.parametrize("mode", sorted(COMPARED))
def test_compare(mode: str, dtype: str) -> None:
    a = RNG.integers(-3, 3, 100)
    b = RNG.integers(-3, 3, 100)
    for other, operand in ((b, tile(dtype, (100,), b)), (np.full(100, 1), DTYPES[dtype](1))):
        target = tile("i1", (100,))
        execute(made("vcmp", 2, 1, compare_mode=mode), [tile(dtype, (100,), a), operand, target])
        expected = [COMPARED[mode](x, y) for x, y in zip(a.tolist(), other.tolist(), strict=True)]
        assert target.read().tolist() == expected
        assert set(expected) == {False, True}


def test_zeros_and_infinities_compare_as_numbers() -> None:
    a, b = [0.0, math.inf, -math.inf], [-0.0, math.inf, math.inf]
    target = tile("i1", (3,))
    execute(made("vcmp", 2, 1, compare_mode="eq"), [tile("f32", (3,), a), tile("f32", (3,), b), target])
    assert target.read().tolist() == [True, True, False]


@pytest.mark.parametrize(("dtype", "n", "bits"), [("f32", 10, 64), ("f32", 64, 64), ("f32", 65, 128), ("f16", 10, 128)])
def test_a_compare_writes_whole_repeats(dtype: str, n: int, bits: int) -> None:
    """256 bytes of the operands are compared at a time, so what was in the bits behind n is lost."""
    x = tile(dtype, (n,), np.zeros(n))
    target = tile("i1", (n,), at=32)
    run, operands = made("vcmp", 2, 1, compare_mode="gt"), [x, x, target]
    assert changed_bytes(target, lambda: execute(run, operands)) == set(range(32, 32 + bits // 8))
    reads, (written,) = accesses(run, operands)
    assert (reads, written.byte_range()) == ([x, x], (32, 32 + bits // 8))


def test_garbage_ends_where_the_memory_does() -> None:
    x = tile("f32", (10,), np.ones(10))
    target = tile("i1", (10,), at=SIZE - 4)
    execute(made("vcmp", 2, 1, compare_mode="eq"), [x, x, target])
    assert target.read().tolist() == [True] * 10


@pytest.mark.parametrize(("n", "bytes_"), [(10, 2), (16, 2), (17, 4), (100, 14)])
def test_not_flips_halfwords(n: int, bytes_: int) -> None:
    bits = RNG.integers(0, 2, n).astype(bool)
    source, target = tile("i1", (n,), bits), tile("i1", (n,), at=32)
    run = made("vnot", 1, 1)
    assert changed_bytes(target, lambda: execute(run, [source, target])) == set(range(32, 32 + bytes_))
    execute(run, [source, target])
    assert target.read().tolist() == [not bit for bit in bits]
    assert accesses(run, [source, target])[1][0].byte_range() == (32, 32 + bytes_)


def test_not_in_rows() -> None:
    bits = RNG.integers(0, 2, (5, 24)).astype(bool)
    target = tile("i1", (5, 24), strides=(256, 1))
    execute(made("vnot", 1, 1), [tile("i1", (5, 24), bits, strides=(256, 1)), target])
    assert target.read().tolist() == [[not bit for bit in row] for row in bits]


@pytest.mark.parametrize("strides", [(24, 1), (256, 1)])
@pytest.mark.parametrize("scalars", ["vv", "vs", "sv", "ss"])
def test_select(scalars: str, strides: tuple[int, int]) -> None:
    bits = RNG.integers(0, 2, (5, 24)).astype(bool)
    inputs: list[Any] = [
        random((5, 24)) if kind == "v" else np.float32(7 + i) for i, kind in enumerate(scalars)
    ]  # fmt: skip
    operands = [tile("f32", (5, 24), value) if value.ndim else value for value in inputs]
    target = tile("f32", (5, 24))
    execute(made("vsel", 3, 1, 1), [tile("i1", (5, 24), bits, strides=strides), *operands, target, tile("f32", (24,))])
    for index in indices((5, 24)):
        assert target.read()[index] == at(inputs[0] if bits[index] else inputs[1], index)


def test_select_keeps_nan_of_the_other_side_out() -> None:
    target = tile("f32", (2,))
    chosen = [tile("f32", (2,), [1.0, math.nan]), tile("f32", (2,), [math.nan, 2.0])]
    execute(made("vsel", 3, 1), [tile("i1", (2,), [True, False]), *chosen, target])
    assert target.read().tolist() == [1.0, 2.0]


# ---- conversions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("rint", [2, -2, 4, -4, 0, 0]),
        ("trunc", [2, -2, 3, -3, 0, 0]),
        ("floor", [2, -3, 3, -4, 0, -1]),
        ("ceil", [3, -2, 4, -3, 1, 0]),
    ],
)
def test_rounding_modes(mode: str, expected: list[int]) -> None:
    target = tile("i32", (6,))
    execute(made("vcast", 1, 1, round_mode=mode), [tile("f32", (6,), [2.5, -2.5, 3.5, -3.5, 0.5, -0.5]), target])
    assert target.read().tolist() == expected


@pytest.mark.parametrize(("dtype", "kind"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_casts_of_floats(dtype: str, kind: torch.dtype) -> None:
    x = torch.from_numpy(np.append(random((200,), 100.0), np.array([1e30, -1e-30, 65520.0, np.inf], np.float32)))
    narrow = tile(dtype, x.shape)
    execute(made("vcast", 1, 1, round_mode="rint"), [tile("f32", x.shape, x.numpy()), narrow])
    assert narrow.read().tolist() == x.to(kind).float().tolist()
    wide = tile("f32", x.shape)
    execute(made("vcast", 1, 1, round_mode="rint"), [narrow, wide])
    assert wide.read().tolist() == x.to(kind).float().tolist()


def test_casts_between_kinds() -> None:
    for source, target, values in (
        ("i32", "f32", [3, -(1 << 24), 7]),
        ("i1", "f16", [True, False, True]),
        ("i32", "i16", [3, -4, 5]),
    ):
        result = tile(target, (3,))
        execute(made("vcast", 1, 1, 1, round_mode="trunc"), [tile(source, (3,), values), result, tile("f16", (48,))])
        assert result.read().tolist() == values


def test_cast_of_a_column_with_gaps() -> None:
    x = random((20, 1))
    target = tile("bf16", (20, 1), strides=(16, 1))
    execute(made("vcast", 1, 1, round_mode="rint"), [tile("f32", (20, 1), x, strides=(8, 1)), target])
    assert target.read().tolist() == torch.from_numpy(x).bfloat16().float().tolist()


# ---- reductions ------------------------------------------------------------------------------------------------------

Combine = Callable[[Any, Any], Any]
REDUCED: dict[str, Combine] = {"sum": operator.add, "max": max, "min": min}  # of numpy's scalars, each step rounded


def fold(groups: Sequence[list[Any]], combine: Combine) -> list[Any]:
    """What the templates do with rows, and with groups of 64 columns: the largest 2^n complete ones are folded once in
    halves, those left over are laid onto the result one after the other, and it is folded down to one."""
    complete = sum(len(group) == len(groups[0]) for group in groups)
    whole = 1 << complete.bit_length() - 1
    half = max(1, whole // 2)
    folded = [list(group) for group in groups[:half]]
    for i, group in enumerate([*groups[half:whole], *groups[whole:]]):
        kept = folded[i % half]
        kept[: len(group)] = [combine(x, y) for x, y in zip(kept, group, strict=False)]
    while len(folded) > 1:
        half = len(folded) // 2
        folded = [[combine(x, y) for x, y in zip(folded[i], folded[half + i], strict=True)] for i in range(half)]
    return folded[0]


def tree(values: list[Any], combine: Combine) -> Any:
    """Neighbours are combined, then the results that are neighbours."""
    while len(values) > 1:
        pairs = [values[i : i + 2] for i in range(0, len(values), 2)]
        values = [combine(*pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return values[0]


def along(row: Sequence[Any], combine: Combine, lanes: int = 64) -> Any:
    return tree(fold([list(row[i : i + lanes]) for i in range(0, len(row), lanes)], combine), combine)


def reduced(arith: str, source: View, axis: int) -> list[Any]:
    shape = (source.shape[0], 1) if axis else (1, source.shape[1])
    target = tile(source.dtype, shape)
    execute(made("vreduce", 1, 1, reduce_dims=(axis,), arith=arith), [source, target])
    return [*target.read().ravel()]


@pytest.mark.parametrize("arith", sorted(REDUCED))
@pytest.mark.parametrize("rows", [2, 3, 4, 6, 7, 16, 24, 48, 100])
def test_reduce_rows_bit_for_bit(rows: int, arith: str) -> None:
    x = random((rows, 18))
    assert reduced(arith, tile("f32", x.shape, x, strides=(24, 1)), 0) == fold([[*row] for row in x], REDUCED[arith])


def test_reduce_one_row() -> None:
    x = random((1, 18))
    assert reduced("sum", tile("f32", x.shape, x), 0) == [*x[0]]


@pytest.mark.parametrize("arith", sorted(REDUCED))
@pytest.mark.parametrize("columns", [1, 2, 6, 7, 8, 40, 64, 65, 100, 127, 128, 130, 192, 200, 256, 300, 320, 448, 512])
def test_reduce_columns_bit_for_bit(columns: int, arith: str) -> None:
    x = random((3, columns))
    assert reduced(arith, tile("f32", x.shape, x), 1) == [along([*row], REDUCED[arith]) for row in x]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 70), columns=st.integers(1, 300), axis=st.integers(0, 1))
def test_sums_of_any_size_bit_for_bit(rows: int, columns: int, axis: int) -> None:
    x = random((rows, 3) if axis == 0 else (2, columns))
    expected = [along([*row], operator.add) for row in x] if axis else fold([[*row] for row in x], operator.add)
    assert reduced("sum", tile("f32", x.shape, x), axis) == expected


def test_the_order_of_a_sum_matters() -> None:
    """2^25 swallows a 1: as neighbours, in halves and one after the other these four sum to three numbers."""
    big = float(1 << 25)
    x = np.array([big, 1, -big, 1], np.float32)
    assert reduced("sum", tile("f32", (1, 4), x[None]), 1) == [0.0]  # (2^25 + 1) + (-2^25 + 1)
    assert reduced("sum", tile("f32", (4, 1), x[:, None]), 0) == [2.0]  # (2^25 - 2^25) + (1 + 1)
    assert ((x[0] + x[1]) + x[2]) + x[3] == 1.0
    wide = np.zeros((1, 256), np.float32)
    wide[0, ::64] = x  # groups of 64 columns, combined as rows are: the first with the third
    assert reduced("sum", tile("f32", wide.shape, wide), 1) == [2.0]
    late = np.zeros((3, 1), np.float32)
    late[:, 0] = [1, big, -big]  # the third row comes behind the fold of the first two
    assert reduced("sum", tile("f32", late.shape, late), 0) == [0.0]


def test_reduce_a_vector() -> None:
    x = random((397,))
    target = tile("f32", (1,))
    execute(made("vreduce", 1, 1, 1, reduce_dims=(0,), arith="sum"), [tile("f32", (397,), x), target])
    assert target.read()[0] == along([*x], operator.add)


def test_reduce_into_a_column_with_gaps() -> None:
    x = random((6, 40))
    target = tile("f32", (6, 1), strides=(8, 1))
    run = made("vreduce", 1, 1, reduce_dims=(1,), arith="max")
    operands = [tile("f32", x.shape, x), target]
    execute(run, operands)
    assert target.read().tolist() == [[max(row)] for row in x.tolist()]
    assert changed_bytes(target, lambda: execute(run, operands)) == {32 * r + i for r in range(6) for i in range(4)}


def test_reduce_the_first_of_three_axes() -> None:
    x = random((5, 2, 8))
    target = tile("f32", (1, 2, 8))
    execute(made("vreduce", 1, 1, reduce_dims=(0,), arith="sum"), [tile("f32", x.shape, x), target])
    assert [*target.read().ravel()] == fold([[*part.ravel()] for part in x], operator.add)


def test_reduce_a_middle_axis_and_integers() -> None:
    x = RNG.integers(-50, 50, (3, 5, 4))
    for axis, shape in ((1, (3, 1, 4)), (2, (3, 5, 1))):
        target = tile("i32", shape)
        execute(made("vreduce", 1, 1, reduce_dims=(axis,), arith="sum"), [tile("i32", x.shape, x), target])
        for index in indices(shape):
            ranges = [range(5 if axis == 1 else 4) if i == axis else [k] for i, k in enumerate(index)]
            assert target.read()[index] == sum(int(x[place]) for place in itertools.product(*ranges))


def test_repeats_of_halves_have_128_lanes() -> None:
    """The vendor's documents of ReduceSum: 128 elements of fp16 are one repeat, added as neighbours."""
    x = np.zeros((1, 100), np.float16)
    x[0, [0, 1, 64]] = [2048, 1, -2048]
    assert along([*x[0]], operator.add, lanes=64) == 1
    assert along([*x[0]], operator.add, lanes=128) == 0  # 2048 swallows its neighbour
    assert reduced("sum", tile("f16", x.shape, x), 1) == [0]


# ---- arange ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "strides", "shape"), [((5,), (3,), (10,)), ((), (1,), (4,)), ((2,), (10, 1), (3, 4))]
)
def test_arange(offset: tuple[int, ...], strides: tuple[int, ...], shape: tuple[int, ...]) -> None:
    target = tile("i32", shape)
    run = made("varange", 1, len(offset), len(strides))
    execute(run, [target, *offset, *strides])
    for index in indices(shape):
        steps = sum(i * stride for i, stride in zip(index, strides, strict=True))
        assert target.read()[index] == sum(offset) + steps
    assert accesses(run, [target, *offset, *strides]) == ([], [target])


# ---- transfers -------------------------------------------------------------------------------------------------------


def rows_of_memory(dtype: str, rows: int, columns: int, pitch: int) -> tuple[View, np.ndarray]:
    x = random((rows, pitch), 30.0) if dtype[0] != "i" else RNG.integers(-99, 99, (rows, pitch))
    whole = tile(dtype, x.shape, x, kind="tensor")
    source = beside(whole, dtype, (rows, columns), (pitch, 1))
    return source, source.read()


@pytest.mark.parametrize(("dtype", "per_block"), [("f32", 8), ("f16", 16), ("bf16", 16), ("i32", 8)])
@pytest.mark.parametrize("pads", [True, False])
def test_a_load_fills_its_last_blocks(dtype: str, per_block: int, pads: bool) -> None:
    source, data = rows_of_memory(dtype, 3, 18, 30)
    pitch = 3 * per_block if per_block == 8 else 4 * per_block  # as far as the next 32 bytes, and further
    target = tile(dtype, (3, 18), strides=(pitch, 1), at=32)
    run = made("load", 1, 1, 1, 1, pad_mode="PadValue") if pads else made("load", 1, 1)
    operands = [source, target, *([DTYPES[dtype](7) if dtype != "bf16" else np.float32(7), 0] if pads else [])]
    size, filled = np.dtype(DTYPES[dtype]).itemsize, -(-18 // per_block) * per_block
    changed = {32 + row * pitch * size + i for row in range(3) for i in range(filled * size)}
    assert changed_bytes(target, lambda: execute(run, operands)) == changed
    execute(run, operands)
    whole = beside(target, dtype, (3, filled), (pitch, 1), at=32).read()
    assert whole[:, :18].tolist() == data.tolist()
    assert np.unique(whole[:, 18:]).tolist() == [7 if pads else 0]
    reads, (written, *_) = accesses(run, operands)
    assert reads == [source]
    assert (written.shape, written.byte_range()) == ((3, filled), (32, 32 + (2 * pitch + filled) * size))


@pytest.mark.parametrize(("n", "filled"), [(1, 8), (8, 8), (13, 16)])
def test_a_load_of_a_vector(n: int, filled: int) -> None:
    source, data = rows_of_memory("f32", 1, n, 20)
    target = tile("f32", (n,), at=64)
    flat = beside(source, "f32", (n,))
    execute(made("load", 1, 1, 1, 1, pad_mode="PadValue"), [flat, target, np.float32(-1e20), 0])
    found = beside(target, "f32", (filled + 1,), at=64).read()
    assert found[:n].tolist() == data[0].tolist()
    assert found[n:filled].tolist() == [np.float32(-1e20)] * (filled - n)
    assert math.isnan(found[filled])


def test_a_load_into_rows_without_room_stops_at_the_next_row() -> None:
    source, data = rows_of_memory("f32", 4, 6, 10)
    target = tile("f32", (4, 6))
    execute(made("load", 1, 1), [source, target])
    assert target.read().tolist() == data.tolist()


def test_a_load_that_gives_every_element_a_block() -> None:
    source, data = rows_of_memory("f32", 7, 1, 3)
    target = tile("f32", (7, 1), strides=(8, 1))
    execute(made("load", 1, 1, 1, 1, pad_mode="PadValue"), [source, target, np.float32(5), 0])
    whole = beside(target, "f32", (7, 8)).read()
    assert whole[:, 0].tolist() == data[:, 0].tolist()
    assert np.unique(whole[:, 1:]).tolist() == [5]


def test_a_strided_load_of_a_vector_fills_the_blocks() -> None:
    source, data = rows_of_memory("f32", 7, 1, 3)
    target = tile("f32", (7,), strides=(8,))
    execute(made("load", 1, 1), [beside(source, "f32", (7,), (3,)), target])
    whole = beside(target, "f32", (7, 8)).read()
    assert whole[:, 0].tolist() == data[:, 0].tolist()
    assert np.unique(whole[:, 1:]).tolist() == [0]


@pytest.mark.parametrize("name", ["load", "store"])
@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_nothing_is_moved_from_or_to_an_empty_tile(name: str, shape: tuple[int, int]) -> None:
    wild = tile("f32", shape, kind="tensor", at=1 << 40)
    target = tile("f32", shape, strides=(8, 1))
    operands = [wild, target] if name == "load" else [target, wild]
    assert changed_bytes(target, lambda: execute(made(name, 1, 1), operands)) == set()


@pytest.mark.parametrize(
    ("shape", "source", "target"), [((13,), (1,), (1,)), ((3, 5), (8, 1), (7, 1)), ((7,), (8,), (3,))]
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["f32", "bf16", "i16"])
def test_a_store_writes_its_elements_alone(
    dtype: str, shape: tuple[int, ...], source: tuple[int, ...], target: tuple[int, ...]
) -> None:
    x = RNG.integers(-99, 99, shape)
    inside, outside = tile(dtype, shape, x, strides=source), tile(dtype, shape, strides=target, kind="tensor", at=6)
    run, size = made("store", 1, 1), np.dtype(DTYPES[dtype]).itemsize
    execute(run, [inside, outside])
    assert outside.read().tolist() == x.tolist()
    firsts = {sum(i * s for i, s in zip(index, target, strict=True)) for index in indices(shape)}
    changed = changed_bytes(outside, lambda: execute(run, [tile(dtype, shape, x, strides=source), outside]))
    assert changed <= {6 + first * size + byte for first in firsts for byte in range(size)}
    assert {(byte - 6) // size for byte in changed} == firsts


def test_transfers_stay_inside_of_tensors() -> None:
    tensor = View(Memory("x", "tensor", np.zeros(40, np.uint8)), "f32", 0, (11,))
    with pytest.raises(OutOfBoundsError, match="of x, which has 40"):
        execute(made("load", 1, 1), [tensor, tile("f32", (11,))])
    with pytest.raises(OutOfBoundsError, match="of x, which has 40"):
        execute(made("store", 1, 1), [tile("f32", (11,)), tensor])


# ---- the cube --------------------------------------------------------------------------------------------------------


def place(fractals: Sequence[int], row: int, column: int) -> tuple[int, ...]:
    """Where an element of a matrix lies in [columns / c, rows / r, r, c]."""
    _, _, r, c = fractals
    return column // c, row // r, row % r, column % c


def in_l1(x: np.ndarray, dtype: str, shape: Sequence[int], behind: float = math.nan) -> View:
    """A matrix in L1, `behind` in the rest of its fractals."""
    blocks = np.full(shape, behind, np.float32)
    for index in indices(x.shape):
        blocks[place(shape, *index)] = x[index]
    return tile(dtype, shape, blocks, kind="L1")


def matrix(view: View, rows: int, columns: int) -> list[list[float]]:
    blocks = view.read()
    return [[blocks[place(view.shape, r, c)].item() for c in range(columns)] for r in range(rows)]


@pytest.mark.parametrize(("dtype", "c0"), [("bf16", 16), ("f32", 8)])
def test_nd2nz(dtype: str, c0: int) -> None:
    """Rows beyond the source, and blocks of columns that it does not reach, keep what they held."""
    source, data = rows_of_memory(dtype, 20, c0 + 3, 40)
    shape = (3, 2, 16, c0)
    target = tile(dtype, shape, np.full(shape, 5.0), kind="L1")
    execute(made("nd2nz", 1, 1), [source, target])
    found = matrix(target, 32, 3 * c0)
    assert [row[: c0 + 3] for row in found[:20]] == data.tolist()
    assert [row[2 * c0 :] for row in found[:20]] == [[5.0] * c0] * 20
    assert found[20:] == [[5.0] * (3 * c0)] * 12


def test_nd2nz_fills_the_last_32_bytes_of_a_row_with_zeros() -> None:
    """copy_gm_to_cbuf_multi_nd2nz in the vendor's documents."""
    source, _ = rows_of_memory("bf16", 20, 19, 40)
    target = tile("bf16", (3, 2, 16, 16), kind="L1")
    execute(made("nd2nz", 1, 1), [source, target])
    assert [row[19:32] for row in matrix(target, 20, 32)] == [[0.0] * 13] * 20


@pytest.mark.parametrize(("dtype", "kind"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_fixpipe_crops_and_converts(dtype: str, kind: torch.dtype) -> None:
    x = random((32, 48), 10.0)
    source = tile("f32", (3, 2, 16, 16), kind="L0C")
    for index in indices(x.shape):
        source.raw()[place(source.shape, *index)] = x[index]
    target = tile(dtype, (17, 35), strides=(40, 1), kind="tensor")
    execute(made("fixpipe", 1, 1), [source, target])
    assert target.read().tolist() == torch.from_numpy(x[:17, :35]).to(kind).float().tolist()
    size = np.dtype(DTYPES[dtype]).itemsize
    assert changed_bytes(target, lambda: execute(made("fixpipe", 1, 1), [source, target])) <= {
        (row * 40 + i) * size + byte for row in range(17) for i in range(35) for byte in range(size)
    }


def multiply(a: View, b: View, c: View, sizes: tuple[int, int, int], flags: str = "", *, start: bool = True) -> None:
    """`flags` are names of attributes that have no value."""
    run = made("mmadL1", 1, 1, 1, 1, 1, 1, 1, 7, 0, 0, **dict.fromkeys(flags.split(), ""))
    execute(run, [a, b, int(start), *sizes, c, *NO_EVENTS])


def products(a: np.ndarray, b: np.ndarray, k: int) -> list[list[float]]:
    return [[sum(float(a[i, x]) * float(b[x, j]) for x in range(k)) for j in range(b.shape[1])] for i in range(len(a))]


def whole_numbers(*shape: int) -> np.ndarray:
    """Small ones, so that sums in any order are exact."""
    return RNG.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize(("dtype", "c0"), [("f16", 16), ("bf16", 16), ("f32", 8)])
@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (32, 32, 48), (5, 7, 9), (17, 20, 33), (1, 1, 1)])
def test_product(m: int, k: int, n: int, dtype: str, c0: int) -> None:
    """Whatever lies behind m, k and n in L1 does not reach the result: here it is NaN."""
    a, b = whole_numbers(m, k), whole_numbers(k, n)
    k1, m1, n1 = -(-k // c0), -(-m // 16), -(-n // 16)
    b_rows = -(-k // 16)
    c = tile("f32", (n1, m1, 16, 16), kind="L0C")
    multiply(in_l1(a, dtype, (k1, m1, 16, c0)), in_l1(b, dtype, (-(-n // c0), b_rows, 16, c0)), c, (m, k, n))
    assert matrix(c, m, n) == products(a, b, k)


@pytest.mark.parametrize("flags", ["b_transpose", "a_transpose", "a_transpose b_transpose"])
def test_transposed_product(flags: str) -> None:
    a, b = whole_numbers(20, 33), whole_numbers(33, 40)
    left = in_l1(a.T, "f16", (2, 3, 16, 16)) if "a_" in flags else in_l1(a, "f16", (3, 2, 16, 16))
    right = in_l1(b.T if "b_" in flags else b, "f16", (3, 3, 16, 16))
    c = tile("f32", (3, 2, 16, 16), kind="L0C")
    multiply(left, right, c, (20, 33, 40), flags)
    assert matrix(c, 20, 40) == products(a, b, 33)


def test_a_flag_may_have_a_value() -> None:
    for value, expected in (("", True), ("true", True), ("false", False)):
        assert made("mmadL1", b_transpose=value).flag("b_transpose") is expected
    assert not made("mmadL1").flag("b_transpose")


def test_products_accumulate_until_one_starts_anew() -> None:
    a, b = whole_numbers(16, 16), whole_numbers(16, 16)
    left, right = in_l1(a, "f16", (1, 1, 16, 16)), in_l1(b, "f16", (1, 1, 16, 16))
    c = tile("f32", (1, 1, 16, 16), kind="L0C")  # NaN: a first product that accumulates would keep it
    once = products(a, b, 16)
    for start, times in ((True, 1), (False, 2), (False, 3), (True, 1)):
        multiply(left, right, c, (16, 16, 16), start=start)
        assert matrix(c, 16, 16) == [[times * value for value in row] for row in once]


def test_a_product_that_a_mask_shortened_leaves_the_columns_behind_it() -> None:
    """The compilers take the number of rows that a masked load brought in as n of q @ k^T: the scores of the others
    stay what the product before them left in the accumulator."""
    q, first, last = whole_numbers(16, 32), whole_numbers(64, 32), whole_numbers(10, 32)
    left = in_l1(q, "f16", (2, 1, 16, 16))
    scores = tile("f32", (4, 1, 16, 16), kind="L0C")
    multiply(left, in_l1(first, "f16", (2, 4, 16, 16)), scores, (16, 32, 64), "b_transpose")
    before = matrix(scores, 16, 64)
    multiply(left, in_l1(last, "f16", (2, 4, 16, 16)), scores, (16, 32, len(last)), "b_transpose")
    after = matrix(scores, 16, 64)
    assert [row[:10] for row in after] == products(q, last.T, 32)
    assert [row[16:] for row in after] == [row[16:] for row in before]  # no NaN, no zero, and nothing of `last`


def test_a_product_that_a_mask_shortened_in_depth() -> None:
    """p @ v over the rows of v that were loaded: what p holds behind them does not count, whatever it is."""
    p, v = whole_numbers(16, 32), whole_numbers(10, 16)
    c = tile("f32", (1, 1, 16, 16), kind="L0C")
    multiply(in_l1(p, "f16", (2, 1, 16, 16)), in_l1(v, "f16", (1, 2, 16, 16)), c, (16, 10, 16))
    assert matrix(c, 16, 16) == products(p, v, 10)
    assert matrix(c, 16, 16) != products(p, np.vstack([v, v, v, v[:2]]), 32)


# ---- what is refused, and what is touched ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "attributes", "roles"),
    [
        ("vreduce", {"arith": "prod"}, (1, 1)),
        ("store", {"atomic_kind": "add"}, (1, 1)),
        ("fixpipe", {"pre_quant": "S322I8"}, (1, 1)),
        ("fixpipe", {"pre_relu": "NORMAL_RELU"}, (1, 1)),
    ],
)
def test_what_is_not_modelled_is_refused(name: str, attributes: dict[str, str], roles: tuple[int, ...]) -> None:
    ((attribute, value),) = attributes.items()
    check_modelled(made(name, *roles))
    with pytest.raises(UnknownInstructionError, match=rf"hivm.hir.{name} at k.py:1: .* {attribute} = {value}"):
        check_modelled(made(name, *roles, **attributes))


def test_transposes_and_unknown_ops_are_refused() -> None:
    transposes = made("vadd", 2, 1, transpose=(1, 0))
    with pytest.raises(UnknownInstructionError, match=r"transpose = \(1, 0\)"):
        check_modelled(transposes)
    check_modelled(made("vadd", 2, 1, transpose=()))
    with pytest.raises(UnknownInstructionError, match=r"hivm.hir.vsort at k.py:1: .* does not model this op"):
        check_modelled(made("vsort", 1, 1))


def test_accesses() -> None:
    x, y, z, scratch = (tile("f32", (8,)) for _ in range(4))
    assert accesses(made("vadd", 2, 1, 1), [x, y, z, scratch]) == ([x, y], [z, scratch])
    assert accesses(made("vadd", 2, 1), [x, np.float32(1), z]) == ([x], [z])
    product = made("mmadL1", 1, 1, 1, 1, 1, 1, 1, 7)
    assert accesses(product, [x, y, 1, 16, 16, 16, z, *NO_EVENTS]) == ([x, y], [z])
    assert accesses(product, [x, y, 0, 16, 16, 16, z, *NO_EVENTS]) == ([x, y, z], [z])
