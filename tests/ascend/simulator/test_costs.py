"""What instructions cost: the table of parameters, and the steps of the device templates against traces of them.

The numbers of steps come from executing the bitcode of the templates (ascendnpu-ir 1.2.0) with every intrinsic logged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from nsa_triton.ascend.chips import CHIPS, chip
from nsa_triton.ascend.simulator import costs
from nsa_triton.ascend.simulator.costs import Cost, Costs, Steps, Traffic, parameters
from nsa_triton.ascend.simulator.instruction import Instruction
from nsa_triton.ascend.simulator.memory import Memory, View
from nsa_triton.ascend.simulator.tiles import ELEMENTWISE, REDUCTIONS
from tests.ascend.simulator.test_tiles import NO_EVENTS, made

CHIP = chip("Ascend910B1")
COSTS = Costs(CHIP)

MEMORIES = {kind: Memory.on_chip(kind, 0) for kind in ("UB", "L1", "L0C", "tensor")}  # costs do not look inside


def shaped(dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None, kind: str = "UB") -> View:
    return View(MEMORIES[kind], dtype, 0, shape, strides)


def f32(*shape: int, strides: Sequence[int] | None = None) -> View:
    return shaped("f32", shape, strides)


def f16(*shape: int, strides: Sequence[int] | None = None) -> View:
    return shaped("f16", shape, strides)


def bits(*shape: int, strides: Sequence[int] | None = None) -> View:
    return shaped("i1", shape, strides)


# ---- the table -------------------------------------------------------------------------------------------------------


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@pytest.mark.parametrize("name", sorted(parameters()["parameters"]))
def test_a_parameter_says_where_it_comes_from(name: str) -> None:
    entry = parameters()["parameters"][name]
    assert {"value", "unit", "source", "uncertainty_percent"} <= set(entry) <= {
        "value", "unit", "source", "uncertainty_percent", "note"
    }  # fmt: skip
    assert is_number(entry["value"])
    assert entry["value"] > 0
    assert entry["unit"].strip()
    assert entry["source"].strip()
    assert is_number(entry["uncertainty_percent"])
    assert 0 <= entry["uncertainty_percent"] < 100
    assert COSTS[name] == entry["value"]


def test_every_chip_is_listed() -> None:
    assert set(parameters()["chips"]) == set(CHIPS)
    assert parameters()["version"]


@pytest.mark.parametrize("name", sorted(CHIPS))
def test_a_chip_has_a_clock_and_memories(name: str) -> None:
    entry = parameters()["chips"][name]
    assert set(entry) == {"clock_mhz", "hbm_gb_per_s", "l2_mib", "source"}
    assert entry["source"].strip()
    assert 1000 < entry["clock_mhz"] < 3000
    assert 400 < entry["hbm_gb_per_s"] < 4000
    assert 32 <= entry["l2_mib"] <= 512
    of_chip = Costs(chip(name))
    assert of_chip.hbm_bytes_per_cycle * of_chip.clock_hz == pytest.approx(entry["hbm_gb_per_s"] * 1e9)
    assert of_chip.shared_rate("HBM", "write") < of_chip.shared_rate("HBM", "read") < of_chip.hbm_bytes_per_cycle
    assert of_chip.shared_rate("L2", "read") > of_chip.shared_rate("HBM", "read")


def test_every_operation_has_cycles() -> None:
    operations = parameters()["operations"]
    for cycles, latency in operations.values():
        assert is_number(cycles)
        assert cycles > 0
        assert latency >= 0
    assert set(ELEMENTWISE) - {"vbrc", "copy"} <= set(operations)


def test_rates_of_a_core() -> None:
    for place, direction in (("UB", "read"), ("UB", "write"), ("L1", "read"), ("L0C", "write")):
        traffic = Traffic(shaped("f32", (8,), kind="tensor"), direction, place, 32)
        assert 0 < COSTS.core_rate("HBM", traffic) <= COSTS.core_rate("L2", traffic)


def test_blocks_and_elements() -> None:
    vector, mixed = COSTS.start_of_blocks(mixed=False), COSTS.start_of_blocks(mixed=True)
    assert vector[0] == mixed[0] == pytest.approx(1000 * 1.85)
    assert vector[1] < mixed[1]
    assert COSTS.element("store", False) == COSTS.element("store", True) < COSTS.element("load", True)
    assert COSTS.element("load", True) < COSTS.element("load", False)


# ---- the steps of the templates --------------------------------------------------------------------------------------


def gapped(rows: int) -> View:
    """A column whose elements have 32 bytes each."""
    return f32(rows, 1, strides=(8, 8))


NUMBER = np.float32(2)


def steps(instruction: Instruction, *operands: Any) -> Steps:
    return costs._STEPS.get(instruction.name, costs._elementwise)(instruction, operands)


def binary(name: str, a: Any, b: Any, target: View) -> Steps:
    return steps(made(name, 2, 1), a, b, target)


def test_repeats_have_64_lanes_of_32_bits() -> None:
    for n, repeats in ((1, 1), (64, 1), (65, 2), (640, 10)):
        assert binary("vadd", f32(n), f32(n), f32(n)) == Steps({"vadd": repeats})
        assert steps(made("vexp", 1, 1), f32(n), f32(n)) == Steps({"vexp": repeats})
    assert binary("vadd", f16(640), f16(640), f16(640)) == Steps({"vadd": 5})


@pytest.mark.parametrize(
    ("a", "b", "target", "instructions", "barriers", "trips"),
    [
        (f32(640), NUMBER, f32(640), 1, 0, 0),
        (f32(640), f32(1), f32(640), 2, 1, 1),  # the one element goes through the scalar unit
        (f32(128, 64), f32(1, 64), f32(128, 64), 1, 0, 0),
        (f32(300, 100, strides=(104, 1)), f32(300, 100, strides=(104, 1)), f32(300, 100, strides=(104, 1)), 4, 0, 0),
        (f32(10, 24), f32(10, 1), f32(10, 24), 2, 1, 0),
        (f32(16, 128), f32(16, 1), f32(16, 128), 3, 1, 0),
        (f32(16, 128), gapped(16), f32(16, 128), 18, 1, 16),
        (f32(32, 64), gapped(32), f32(32, 64), 33, 1, 32),
        (f32(4, 1, 128), f32(4, 16, 128), f32(4, 16, 128), 8, 0, 0),
    ],
)
def test_product_of_tiles(a: View, b: Any, target: View, instructions: int, barriers: int, trips: int) -> None:
    found = binary("vmul", a, b, target)
    assert (found.instructions, found.barriers, found.trips) == (instructions, barriers, trips)


def test_a_column_with_gaps_is_fetched_row_by_row() -> None:
    """The data lies as the vector unit wants it, but the template does not notice."""
    packed, apart = (binary("vmul", f32(64, 128), column, f32(64, 128)) for column in (f32(64, 1), gapped(64)))
    assert packed.repeats == {"vmul": 128, "broadcast": 8}
    assert apart.repeats == {"vmul": 128, "duplicate": 64}
    assert (packed.trips, apart.trips) == (0, 64)


@pytest.mark.parametrize(("name", "instructions", "barriers"), [("vadd", 1, 0), ("vmul", 1, 0), ("vmax", 1, 0),
                                                               ("vmin", 1, 0), ("vdiv", 2, 1)])  # fmt: skip
def test_a_number_as_operand(name: str, instructions: int, barriers: int) -> None:
    found = binary(name, f32(128), NUMBER, f32(128))
    assert (found.instructions, found.barriers, found.trips) == (instructions, barriers, 0)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (f32(128), f16(128), Steps({"vcast": 2})),
        (f16(128, 1, strides=(16, 1)), f32(128, 1, strides=(8, 1)), Steps({"vcast": 128})),
        (bits(128), f16(128), Steps({"duplicate": 1, "vsel": 1}, instructions=2, barriers=1, trips=1)),
    ],
)
def test_casts(source: View, target: View, expected: Steps) -> None:
    assert steps(made("vcast", 1, 1, round_mode="rint"), source, target) == expected


@pytest.mark.parametrize(
    ("a", "b", "target", "expected"),
    [
        (f32(640), f32(640), bits(640), Steps({"vcmp": 10})),
        (f16(1024), np.float16(0), bits(1024), Steps({"vcmp_scalar": 8})),
        (f16(10, 24, strides=(32, 1)), np.float16(0), bits(10, 24, strides=(256, 1)), Steps({"vcmp_scalar": 10}, 10)),
    ],
)
def test_compares(a: View, b: Any, target: View, expected: Steps) -> None:
    assert steps(made("vcmp", 2, 1, compare_mode="eq"), a, b, target) == expected


@pytest.mark.parametrize(
    ("mask", "a", "b", "target", "instructions", "barriers", "trips"),
    [
        (bits(640), f32(640), f32(640), f32(640), 1, 1, 1),
        (bits(640), f32(640), NUMBER, f32(640), 2, 1, 1),
        (bits(16), NUMBER, NUMBER, f32(16), 3, 1, 1),
        # rows of bits lie 32 bytes apart: one call, with its trip, for each
        (bits(10, 24, strides=(256, 1)), f32(10, 24), f32(10, 24), f32(10, 24), 10, 10, 10),
        (bits(10, 24, strides=(256, 1)), f32(10, 24), NUMBER, f32(10, 24), 20, 10, 10),
    ],
)
def test_selects(mask: View, a: Any, b: Any, target: View, instructions: int, barriers: int, trips: int) -> None:
    found = steps(made("vsel", 3, 1), mask, a, b, target)
    assert (found.instructions, found.barriers, found.trips) == (instructions, barriers, trips)


@pytest.mark.parametrize(
    ("source", "target", "instructions", "barriers", "trips"),
    [
        (NUMBER, f32(20000), 1, 0, 0),
        (f32(40, 1), f32(40, 16), 2, 2, 0),
        (f16(1, 128), f16(16, 128), 1, 0, 0),
        (f32(1, 128), f32(16, 128), 1, 0, 0),
        (gapped(16), f32(16, 128), 16, 0, 1),  # all rows are read in one wait
        (f32(16, 1), f32(16, 8), 1, 1, 0),  # a row is one block of 32 bytes
        (f32(300, 1), f32(300, 16), 3, 2, 0),
    ],
)
def test_broadcasts(source: Any, target: View, instructions: int, barriers: int, trips: int) -> None:
    found = steps(made("vbrc", 1, 1), source, target)
    assert (found.instructions, found.barriers, found.trips) == (instructions, barriers, trips)


def test_the_rows_of_a_gapped_column_are_read_one_by_one() -> None:
    assert steps(made("vbrc", 1, 1), gapped(16), f32(16, 128)).reads == 16
    assert steps(made("vbrc", 1, 1), f32(16, 1), f32(16, 128)).reads == 0


@pytest.mark.parametrize(("n", "instructions", "barriers"), [(10, 1, 0), (16, 1, 0), (128, 4, 3), (8, 0, 0)])
def test_arange(n: int, instructions: int, barriers: int) -> None:
    """Eight elements by the scalar unit, which count as instructions here; then twice as many with each one."""
    found = steps(made("varange", 1, 1, 1), shaped("i32", (n,)), 0, 1)
    assert (found.instructions - 8, found.barriers, found.trips) == (instructions, barriers, 1)


def test_not_and_copy_take_one_instruction() -> None:
    assert steps(made("vnot", 1, 1), bits(1024), bits(1024)).instructions == 1
    rows = bits(10, 24, strides=(256, 1))
    assert steps(made("vnot", 1, 1), rows, rows).instructions == 1
    assert steps(made("copy", 1, 1), f32(1024), f32(1024)).instructions == 1


# ---- reductions ------------------------------------------------------------------------------------------------------


def reduction(arith: str, axis: int, source: View, target: View) -> Steps:
    return steps(made("vreduce", 1, 1, reduce_dims=(axis,), arith=arith), source, target)


@pytest.mark.parametrize(("rows", "columns"), [(2, 128), (16, 64), (16, 112), (48, 64), (100, 64), (6, 128), (7, 64)])
@pytest.mark.parametrize("arith", sorted(REDUCTIONS))
def test_a_sum_of_rows_adds_each_row_but_one(arith: str, rows: int, columns: int) -> None:
    found = reduction(arith, 0, f32(rows, columns), f32(1, columns))
    assert [*found.repeats.values()] == [(rows - 1) * math.ceil(columns / 64)]
    assert found.trips == 0


SUMS_OF_ROWS = {  # traced: vector instructions and barriers
    (16, 64): (4, 3), (16, 112): (8, 3), (16, 128): (7, 3), (16, 192): (9, 3), (16, 256): (11, 3), (32, 128): (9, 4),
    (48, 64): (6, 5), (64, 128): (11, 5), (100, 64): (8, 7), (128, 64): (7, 6), (6, 128): (5, 2), (7, 64): (4, 3),
    (2, 64): (1, 0),
}  # fmt: skip


@pytest.mark.parametrize("shape", SUMS_OF_ROWS, ids=str)
def test_steps_of_a_sum_of_rows(shape: tuple[int, int]) -> None:
    found = reduction("sum", 0, f32(*shape), f32(1, shape[1]))
    assert (found.instructions, found.barriers) == SUMS_OF_ROWS[shape]


SUMS_OF_COLUMNS = {65: (3, 4), 128: (2, 3), 192: (3, 4), 256: (4, 4), 320: (5, 5), 448: (7, 6)}  # of 16 rows


@pytest.mark.parametrize("columns", SUMS_OF_COLUMNS)
def test_steps_of_a_sum_of_columns(columns: int) -> None:
    found = reduction("sum", 1, f32(16, columns), f32(16, 1))
    assert (found.instructions, found.barriers) == SUMS_OF_COLUMNS[columns]
    assert found.repeats == {"vadd": 16 * (found.instructions - 1), "sum_lanes": 16}


@pytest.mark.parametrize(
    ("arith", "source", "target", "repeats", "instructions", "barriers", "trips"),
    [
        ("sum", f32(40, 16), f32(40, 1), 40, 1, 2, 0),  # a repeat for each row, however short
        ("max", f32(32, 64), f32(32, 1), 32, 1, 2, 0),
        ("max", f32(40, 8), f32(40, 1), 40, 1, 2, 0),
        ("sum", f32(10, 8, strides=(16, 1)), f32(10, 1), 10, 1, 2, 0),
        ("sum", f32(128, 64), f32(128, 1, strides=(8, 1)), 128, 128, 129, 0),
        ("sum", f32(16), f32(1), 1, 1, 2, 0),
        ("max", f32(16), f32(1), 1, 1, 0, 1),
        ("max", f32(640), f32(1), 12, 3, 3, 1),
        ("sum", f32(40, 8), f32(40, 1), 5, 1, 0, 0),  # eight rows to a repeat
        ("sum", f32(8), f32(1), 1, 1, 0, 0),
        ("sum", f32(300, 16), f32(300, 1), 300, 2, 3, 0),
        ("max", f32(300, 128), f32(300, 1), 600, 4, 4, 0),
        ("sum", f32(16, 128), f32(16, 1, strides=(8, 1)), 32, 17, 18, 0),
        ("max", f32(1, 64), f32(1, 1), 1, 1, 2, 0),  # not the template of a vector
        ("min", f32(100), f32(1), 4, 4, 4, 1),
    ],
)
def test_steps_along_a_row(
    arith: str, source: View, target: View, repeats: int, instructions: int, barriers: int, trips: int
) -> None:
    found = reduction(arith, len(source.shape) - 1, source, target)
    assert sum(found.repeats.values()) == repeats
    assert (found.instructions, found.barriers, found.trips) == (instructions, barriers, trips)


# ---- the cube, and transfers -----------------------------------------------------------------------------------------


def product_operands(dtype: str, m: int, k: int, n: int) -> list[Any]:
    c0 = 8 if dtype == "f32" else 16
    a = shaped(dtype, (-(-k // c0), -(-m // 16), 16, c0), kind="L1")
    b = shaped(dtype, (-(-n // c0), -(-k // 16), 16, c0), kind="L1")
    c = shaped("f32", (-(-n // 16), -(-m // 16), 16, 16), kind="L0C")
    return [a, b, 1, m, k, n, c, *NO_EVENTS]


PRODUCT = made("mmadL1", 1, 1, 1, 1, 1, 1, 1, 7)


@pytest.mark.parametrize(
    ("dtype", "side", "depth"),
    [("f16", 16, 1024), ("f16", 48, 336), ("bf16", 64, 256), ("f16", 80, 192), ("f16", 96, 160), ("f16", 128, 128),
     ("bf16", 256, 64), ("f32", 16, 512), ("f32", 48, 160), ("f32", 64, 128), ("f32", 128, 64)],
)  # fmt: skip
def test_the_depth_of_a_piece(dtype: str, side: int, depth: int) -> None:
    for k, pieces in ((depth, 1), (depth + 1, 2), (3 * depth, 3)):
        for m, n in ((side, 1), (1, side), (side - 15, side)):
            assert COSTS.pieces(product_operands(dtype, m, k, n))[3] == pieces


def test_pieces_are_whole_fractals() -> None:
    assert COSTS.pieces(product_operands("f16", 5, 20, 33)) == (16, 48, 20, 1)
    assert COSTS.pieces(product_operands("f16", 0, 0, 0)) == (16, 16, 0, 1)  # nothing is left to multiply


def test_a_product_takes_a_cycle_per_fractal() -> None:
    """16 x 16 x 16 in fp16 and 16 x 16 x 4 in fp32, and its start."""
    start = COSTS["product_start"]
    assert COSTS.tile(PRODUCT, product_operands("f16", 128, 128, 128)).occupancy == 8 * 8 * 8 + start
    assert COSTS.tile(PRODUCT, product_operands("f32", 128, 64, 128)).occupancy == 8 * 8 * 16 + start
    one = COSTS.tile(PRODUCT, product_operands("bf16", 16, 16, 16))
    assert (one.occupancy + one.latency, one.products, one.dtype) == (1 + start + 24, 16**3, "bf16")


def test_small_products_wait_for_each_piece() -> None:
    few, many = (COSTS.tile(PRODUCT, product_operands("f16", m, 4096, 16)) for m in (144, 160))
    pieces = [COSTS.pieces(product_operands("f16", m, 4096, 16))[3] for m in (144, 160)]
    assert few.occupancy == 9 * 256 + pieces[0] * COSTS["product_start"] + (pieces[0] - 1) * COSTS["product_latency"]
    assert many.occupancy == 10 * 256 + pieces[1] * COSTS["product_start"]


def test_feeding_the_cube() -> None:
    cost, pieces = COSTS.feed(product_operands("f16", 64, 512, 128))
    assert pieces == 4
    assert cost.occupancy == 512 * 2 * (64 / COSTS["l0a_rate"] + 128 / COSTS["l0b_rate"])


def test_transfers_know_their_traffic() -> None:
    outside, inside = (
        shaped("bf16", (20, 30), strides=(64, 1), kind="tensor"),
        shaped("bf16", (20, 30), strides=(32, 1)),
    )
    for name, operands, direction in (("load", [outside, inside], "read"), ("store", [inside, outside], "write")):
        cost = COSTS.tile(made(name, 1, 1), operands)
        assert cost.traffic == Traffic(outside, direction, "UB", 20 * 30 * 2)
        assert cost.occupancy == 20 * COSTS["transfer_row"]
    column = shaped("bf16", (20,), strides=(64,), kind="tensor")  # every element by itself
    assert COSTS.tile(made("load", 1, 1), [column, shaped("bf16", (20,))]).occupancy == 20 * COSTS["transfer_row"]
    l1 = COSTS.tile(made("nd2nz", 1, 1), [outside, shaped("bf16", (2, 2, 16, 16), kind="L1")])
    assert (l1.traffic, l1.latency) == (Traffic(outside, "read", "L1", 1200), COSTS["l1_load_latency"])


def test_empty_tiles_cost_a_call() -> None:
    nothing = Cost(COSTS["vector_call"], 0.0)
    assert COSTS.tile(made("load", 1, 1), [shaped("f32", (0, 8), kind="tensor"), f32(0, 8)]) == nothing
    assert COSTS.tile(made("vadd", 2, 1), [f32(0, 8), f32(0, 8), f32(0, 8)]) == nothing


# ---- time ------------------------------------------------------------------------------------------------------------


def total(cost: Cost) -> float:
    return cost.issue + cost.occupancy + cost.latency + cost.trips * COSTS.round_trip


KINDS: dict[str, Callable[[int], tuple[Instruction, list[Any]]]] = {
    **{name: lambda n, name=name: (made(name, 2, 1), [f32(n), f32(n), f32(n)])  # type: ignore[misc]
       for name in ("vadd", "vsub", "vmul", "vdiv", "vmax", "vmin", "vand", "vor", "vshl", "vshr")},
    **{name: lambda n, name=name: (made(name, 1, 1), [f32(n), f32(n)])  # type: ignore[misc]
       for name in ("vabs", "vexp", "vln", "vsqrt", "vrec", "vrelu", "vrsqrt", "copy")},
    "vnot": lambda n: (made("vnot", 1, 1), [bits(n), bits(n)]),
    "vcmp": lambda n: (made("vcmp", 2, 1, compare_mode="eq"), [f32(n), f32(n), bits(n)]),
    "vsel": lambda n: (made("vsel", 3, 1), [bits(n), f32(n), NUMBER, f32(n)]),
    "vcast": lambda n: (made("vcast", 1, 1, round_mode="rint"), [f32(n), f16(n)]),
    "vbrc": lambda n: (made("vbrc", 1, 1), [NUMBER, f32(n)]),
    "columns": lambda n: (made("vbrc", 1, 1), [f32(16, 1), f32(16, n)]),
    "gaps": lambda n: (made("vmul", 2, 1), [f32(n, 64), gapped(n), f32(n, 64)]),
    "varange": lambda n: (made("varange", 1, 1, 1), [shaped("i32", (n,)), 0, 1]),
    "sum of rows": lambda n: (made("vreduce", 1, 1, reduce_dims=(0,), arith="sum"), [f32(n, 64), f32(1, 64)]),
    "sums": lambda n: (made("vreduce", 1, 1, reduce_dims=(1,), arith="sum"), [f32(n, 64), f32(n, 1)]),
    "sum": lambda n: (made("vreduce", 1, 1, reduce_dims=(0,), arith="sum"), [f32(n), f32(1)]),
    "max": lambda n: (made("vreduce", 1, 1, reduce_dims=(0,), arith="max"), [f32(n), f32(1)]),
    "load": lambda n: (made("load", 1, 1), [shaped("f32", (n, 8), kind="tensor"), f32(n, 8)]),
    "m": lambda n: (PRODUCT, product_operands("f16", n, 64, 64)),
    "k": lambda n: (PRODUCT, product_operands("bf16", 64, n, 64)),
    "n": lambda n: (PRODUCT, product_operands("f32", 64, 64, n)),
    "fill of L1": lambda n: (made("vbrc", 1, 1), [NUMBER, shaped("f16", (n,), kind="L1")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_more_work_takes_more_time(kind: str) -> None:
    found = [total(COSTS.tile(*KINDS[kind](n))) for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048)]
    assert all(a <= b for a, b in itertools.pairwise(found))
    assert found[-1] > found[0] > 0
    assert all(map(is_number, found))


def test_every_elementwise_operation_is_covered() -> None:
    assert set(ELEMENTWISE) <= set(KINDS)


def test_a_second_look_at_the_same_shapes_is_remembered_by_shape_and_strides() -> None:
    run = made("vmul", 2, 1)
    packed, apart = ([f32(64, 128), column, f32(64, 128)] for column in (f32(64, 1), gapped(64)))
    first, other = COSTS.tile(run, packed), COSTS.tile(run, apart)
    assert COSTS.tile(run, packed) == first != other
    assert total(other) > 5 * total(first)
