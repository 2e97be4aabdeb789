"""How many cycles an instruction takes: the shapes of its operands, the steps of its device template, and chips.json.

The steps (how many vector instructions and repeats, how many barriers, how often the scalar unit waits for the vector
pipe) were traced by executing the templates' bitcode; docs/simulator.md has the table. The cycles are published ones.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from nsa_triton.ascend.chips import Chip, chip
from nsa_triton.ascend.simulator.instruction import Instruction
from nsa_triton.ascend.simulator.memory import BITS, View

MOST_REPEATS = 255  # of one vector instruction
L0_HALF = 32 << 10  # bytes: L0A and L0B are double buffered


@dataclass(frozen=True)
class Traffic:
    """What a transfer asks of the shared memory."""

    view: View  # in global memory
    direction: str  # read or write
    place: str  # on the chip: UB, L1 or L0C
    bytes: int


@dataclass(frozen=True)
class Cost:
    """Cycles: `issue` of the scalar unit, `occupancy` of the pipe, `latency` until the result is there. `trips`: how
    often the scalar unit waits on the way until the pipe is empty."""

    issue: float
    occupancy: float
    latency: float = 0.0
    trips: int = 0
    traffic: Traffic | None = None
    products: int = 0  # multiply-adds
    dtype: str = ""  # of their factors
    elements: int = 0


@dataclass(frozen=True)
class Steps:
    """What a vector template does for one tile."""

    repeats: Mapping[str, float]  # by operation
    instructions: int = 1
    barriers: int = 0
    trips: int = 0
    reads: int = 0  # elements that the scalar unit fetches without waiting for each


@functools.cache
def parameters() -> Mapping[str, Any]:
    text = (resources.files(__package__) / "chips.json").read_text()
    content: Mapping[str, Any] = json.loads(text)
    return content


def figures(name: str) -> Mapping[str, Any]:
    """All that the model knows of a chip: cores, memories, clock and bandwidth, without where they come from."""
    own = {**vars(chip(name)), **parameters()["chips"][name]}
    return {what: value for what, value in own.items() if what not in ("name", "source")}


class Costs:
    """The costs on one chip."""

    def __init__(self, chip: Chip) -> None:
        data = parameters()
        self.chip, self.version = chip, data["version"]
        self._value: dict[str, float] = {name: entry["value"] for name, entry in data["parameters"].items()}
        self._operations: dict[str, tuple[float, float]] = data["operations"]
        one = data["chips"][chip.name]
        self.clock_hz = one["clock_mhz"] * 1e6
        self.hbm_bytes_per_cycle = one["hbm_gb_per_s"] * 1e9 / self.clock_hz
        self.l2_bytes = one["l2_mib"] << 20
        self._tiles: dict[tuple[Any, ...], Cost] = {}
        for name in ("scalar_operation", "flag", "flag_across", "round_trip"):
            setattr(self, name, self._value[name])

    scalar_operation: float
    flag: float
    flag_across: float
    round_trip: float

    def __getitem__(self, name: str) -> float:
        return self._value[name]

    def start_of_blocks(self, *, mixed: bool) -> tuple[float, float]:
        """Cycles before the first block, and before each one."""
        per_ns = self.clock_hz / 1e9
        return self["launch"] * per_ns, self["mixed_block" if mixed else "block"] * per_ns

    # ---- the memory that all cores share ----

    def shared_rate(self, level: str, direction: str) -> float:
        """Bytes per cycle that the HBM or the L2 serves to all cores together."""
        if level == "HBM":
            rate: float = self.hbm_bytes_per_cycle * self["hbm_efficiency"]
            return rate if direction == "read" else rate / self["hbm_write_cost"]
        return self[f"l2_{direction}_rate"] * self.chip.cube_cores

    def core_rate(self, level: str, traffic: Traffic) -> float:
        """Bytes per cycle that one core moves."""
        if traffic.place == "L0C":
            return self["l0c_to_gm"]
        way = "from" if traffic.direction == "read" else "to"
        return self[f"{traffic.place.lower()}_{way}_{level.lower()}"]

    # ---- instructions ----

    def element(self, name: str, is_cached: bool) -> float:
        """Cycles that the scalar unit spends on one element of a memory."""
        if name == "store":
            return self["scalar_store"]
        return self["scalar_hit"] if is_cached else self["scalar_miss"]

    def tile(self, instruction: Instruction, operands: Sequence[Any]) -> Cost:
        if instruction.name in ("load", "store", "nd2nz", "fixpipe"):
            return self._transfer(instruction, operands[0], operands[1])
        if instruction.name == "mmadL1":
            return self._product(operands)
        key = (instruction, *((o.shape, o.strides) if isinstance(o, View) else None for o in operands))
        found = self._tiles.get(key)
        if found is None:
            found = self._tiles[key] = self._vector(instruction, operands)
        return found

    def _vector(self, instruction: Instruction, operands: Sequence[Any]) -> Cost:
        target = operands[0] if instruction.name == "varange" else operands[instruction.parts[1]][0]
        if target.memory.kind == "L1":  # a fill
            return Cost(self["vector_call"], target.bytes / self["vector_bytes"], self["copy_latency"])
        if 0 in target.shape:
            return Cost(self["vector_call"], 0.0)
        steps = _STEPS.get(instruction.name, _elementwise)(instruction, operands)
        cycles = sum(repeats * self._operations[name][0] for name, repeats in steps.repeats.items())
        latency = self["vector_latency"] + max(self._operations[name][1] for name in steps.repeats)
        return Cost(
            issue=self["vector_call"]
            + self["vector_more"] * max(0, steps.instructions - 1)
            + self["scalar_hit"] * steps.reads,
            occupancy=cycles + steps.barriers * latency,
            latency=latency,
            trips=steps.trips,
            elements=max(o.size for o in operands if isinstance(o, View)),
        )

    def _transfer(self, instruction: Instruction, source: View, target: View) -> Cost:
        name = instruction.name
        reads = name in ("load", "nd2nz")
        outside, inside = (source, target) if reads else (target, source)
        latency = {"load": "load_latency", "nd2nz": "l1_load_latency", "store": "store_latency"}.get(
            name, "fixpipe_latency"
        )
        rows = math.prod(outside.shape[:-1]) if outside.shape and outside.strides[-1] == 1 else outside.size
        traffic = Traffic(outside, "read" if reads else "write", inside.memory.kind, outside.bytes)
        if 0 in outside.shape:
            return Cost(self["vector_call"], 0.0)
        return Cost(self["vector_call"], rows * self["transfer_row"], self[latency], traffic=traffic)

    def pieces(self, operands: Sequence[Any]) -> tuple[int, int, int, int]:
        """A product's rows, columns and depth as the cube takes them, and into how many pieces its depth is cut."""
        a, m, k, n = operands[0], *operands[3:6]
        bytes_ = BITS[a.dtype] // 8
        rows, columns = -(-max(m, 1) // 16) * 16, -(-max(n, 1) // 16) * 16
        piece = max(16, L0_HALF // bytes_ // max(rows, columns) // 16 * 16)
        return rows, columns, k, max(1, -(-k // piece))

    def feed(self, operands: Sequence[Any]) -> tuple[Cost, int]:
        """From L1 to L0A and L0B, and in how many pieces."""
        rows, columns, k, pieces = self.pieces(operands)
        bytes_ = BITS[operands[0].dtype] // 8
        cycles = k * bytes_ * (rows / self["l0a_rate"] + columns / self["l0b_rate"])
        return Cost(0.0, cycles, self["l0_latency"]), pieces

    def _product(self, operands: Sequence[Any]) -> Cost:
        rows, columns, k, pieces = self.pieces(operands)
        side, depth = self["cube_rows"], self["cube_depth_32" if operands[0].dtype == "f32" else "cube_depth_16"]
        fractals = rows / side * columns / side
        cycles = fractals * math.ceil(k / depth) + pieces * self["product_start"]
        if fractals < 10:  # the template waits for each piece
            cycles += (pieces - 1) * self["product_latency"]
        useful = int(operands[3]) * int(k) * int(operands[5])
        return Cost(
            self["vector_call"] + 4 * self["vector_more"] * pieces,
            cycles,
            self["product_latency"],
            products=useful,
            dtype=operands[0].dtype,
        )


# ---- the steps of the vector templates ----


def _lanes(view: View) -> int:
    """Elements of one repeat."""
    return 2048 // max(16, BITS[view.dtype])


def _rows_and_columns(view: View) -> tuple[int, int]:
    if len(view.shape) < 2:
        return 1, view.size
    return math.prod(view.shape[:-1]), view.shape[-1]


def _pieces(rows: int) -> int:
    return -(-rows // MOST_REPEATS)


def _over(name: str, view: View, lanes: int) -> Steps:
    """One operation over a tile: lying side by side in one instruction, else the full groups of columns, one by one or
    row by row, and what is left of the columns; all that for each element of a third axis."""
    rows, columns = _rows_and_columns(view)
    outer = math.prod(view.shape[:-2])
    full, rest = divmod(columns, lanes)
    inner = rows // max(1, outer)
    instructions = outer * (min(full * _pieces(inner), inner * _pieces(full)) + (_pieces(inner) if rest else 0))
    return Steps({name: rows * -(-columns // lanes)}, instructions=1 if len(view.shape) < 2 else instructions)


def _elementwise(instruction: Instruction, operands: Sequence[Any]) -> Steps:
    name, target = instruction.name, operands[instruction.parts[1]][0]
    sources = operands[instruction.parts[0]]
    lanes = _lanes(target)
    if any(not isinstance(source, View) for source in sources):
        if name in ("vadd", "vmul", "vmax", "vmin"):
            return _over("scalar", target, lanes)
        return _with(_over(name, target, lanes), "duplicate", 1, barriers=1)
    steps = _over(name, target, lanes)
    for source in sources:
        if source.size == 1 and target.size > 1 and len(target.shape) == 1:
            steps = _with(steps, "duplicate", 1, barriers=1, trips=1)
        elif len(source.shape) > 1 and source.shape[-1] == 1 and target.shape[-1] > 1:
            rows = source.size
            if source.strides[-2] == 1:
                steps = _with(steps, "broadcast", -(-rows // 8), barriers=1)
            else:  # an element in 32 bytes of its own: the template fetches each with the scalar unit
                steps = _with(steps, "duplicate", rows, instructions=rows, barriers=1, trips=rows)
    return steps


def _with(
    steps: Steps, name: str, repeats: float, *, instructions: int = 1, barriers: int = 0, trips: int = 0
) -> Steps:
    together = dict(steps.repeats)
    together[name] = together.get(name, 0) + repeats
    return Steps(
        together, steps.instructions + instructions, steps.barriers + barriers, steps.trips + trips
    )  # fmt: skip


def _compare(instruction: Instruction, operands: Sequence[Any]) -> Steps:
    tiles = [source for source in operands[instruction.parts[0]] if isinstance(source, View)]
    name = "vcmp" if len(tiles) > 1 else "vcmp_scalar"
    rows, columns = _rows_and_columns(tiles[0])  # rows of bits lie apart: one call for each
    return Steps({name: rows * -(-columns // _lanes(tiles[0]))}, instructions=rows)


def _select(instruction: Instruction, operands: Sequence[Any]) -> Steps:
    """The scalar unit writes the address of the mask into the unified buffer, between two waits. Rows of bits lie
    apart: one call for each."""
    target = operands[instruction.parts[1]][0]
    numbers = sum(not isinstance(source, View) for source in operands[instruction.parts[0]])
    rows, columns = _rows_and_columns(target)
    calls = rows if _is_strided(operands[0]) else 1
    repeats = rows * -(-columns // _lanes(target)) if calls > 1 else -(-target.size // _lanes(target))
    steps = Steps({"vsel": repeats}, instructions=calls, barriers=calls, trips=calls)
    return _with(steps, "duplicate", calls * numbers, instructions=calls * numbers) if numbers else steps


def _is_strided(mask: Any) -> bool:
    return isinstance(mask, View) and len(mask.shape) > 1 and mask.shape[0] > 1


def _cast(instruction: Instruction, operands: Sequence[Any]) -> Steps:
    source, target = operands[0], operands[instruction.parts[1]][0]
    if source.dtype == "i1":
        return Steps({"duplicate": 1, "vsel": -(-source.size // 128)}, instructions=2, barriers=1, trips=1)
    return _over("vcast", target, min(_lanes(source), _lanes(target)))


def _reduce(instruction: Instruction, operands: Sequence[Any]) -> Steps:
    source, target = operands[0], operands[instruction.parts[1]][0]
    adds = instruction.attributes["arith"] == "sum"
    name, lanes_name = ("vadd", "sum_lanes") if adds else ("vmax", "max_lanes")
    rows, columns = _rows_and_columns(source)
    if len(source.shape) > 1 and instruction.numbers["reduce_dims"] != (len(source.shape) - 1,):
        return _halves(name, source.shape[0], source.size // source.shape[0], _lanes(source))
    lanes = _lanes(source)
    if len(source.shape) < 2 and not adds:  # the scalar unit fetches the result
        if columns <= lanes:
            return Steps({lanes_name: 1}, trips=1)
        ends = 3 + (columns % lanes > 0)
        return Steps({"duplicate": 1, name: -(-columns // lanes), lanes_name: 1}, ends, ends, trips=1)
    is_apart = len(target.shape) > 1 and rows > 1 and target.strides[-2] != 1  # 32 bytes for an element: row by row
    side_by_side = len(source.shape) < 2 or rows == 1 or source.strides[-2] == columns
    if adds and columns * BITS[source.dtype] == 256 and side_by_side and not is_apart:
        return Steps({lanes_name: -(-source.size // lanes)})  # 32 bytes: one instruction sums all of them
    folded = _folds(columns // lanes, -(-columns // lanes)) if columns > lanes else []
    pieces = _pieces(rows)
    return Steps(
        {lanes_name: rows} | ({name: rows * sum(folded)} if folded else {}),
        instructions=pieces * sum(folded) + (rows if is_apart else pieces),
        barriers=len(folded) + 1 + (rows if is_apart else pieces),
    )


def _folds(complete: int, parts: int) -> list[int]:
    """How many parts each step of a fold combines: the largest 2^n complete ones in halves (one alone is copied), those
    left over onto the result, and the result in halves."""
    whole = 1 << complete.bit_length() - 1
    half = max(1, whole // 2)
    left = range(whole, parts, half)
    return [half, *(min(half, parts - start) for start in left), *(half >> n for n in range(1, half.bit_length()))]


def _halves(name: str, rows: int, columns: int, lanes: int) -> Steps:
    """A fold of the first axis."""
    full, rest = divmod(columns, lanes)
    folded = _folds(rows, rows)
    return Steps(
        {name: -(-columns // lanes) * max(1, rows - 1)},
        instructions=sum(min(full, step) * (full > 0) + (rest > 0) for step in folded),
        barriers=len(folded) - 1,
    )


def _broadcast(instruction: Instruction, operands: Sequence[Any]) -> Steps:
    source, target = operands[0], operands[instruction.parts[1]][0]
    if not isinstance(source, View):
        return _over("duplicate", target, _lanes(target))
    rows, columns = _rows_and_columns(target)
    groups = -(-columns // _lanes(target))
    if source.shape[-1] == target.shape[-1]:  # a row, copied
        return Steps({"broadcast": rows * groups}, instructions=_pieces(rows))
    rows = source.size
    if len(source.shape) > 1 and source.strides[-2] != 1 and rows > 1:  # the scalar unit reads them all in one wait
        return Steps({"duplicate": rows * groups}, instructions=rows, trips=1, reads=rows)
    if columns * BITS[target.dtype] == 256 and rows % 8 == 0:
        return Steps({"broadcast": rows // 8}, barriers=1)
    return Steps({"broadcast": -(-rows // 8) + rows * groups}, instructions=1 + _pieces(rows), barriers=2)


def _arange(_: Instruction, operands: Sequence[Any]) -> Steps:
    target = operands[0]
    steps = math.ceil(math.log2(max(1, target.size / 8)))
    repeats = -(-target.size // 64) + steps
    return Steps({"scalar": repeats}, instructions=8 + steps, barriers=max(0, steps - 1), trips=1)


def _transpose(_: Instruction, operands: Sequence[Any]) -> Steps:
    """16 rows of 32 bytes at a time; one call for 16 rows, after the scalar unit has set 32 addresses."""
    source = operands[0]
    return Steps({"vnchwconv": -(-source.bytes // 256)}, instructions=8 * -(-_rows_and_columns(source)[0] // 16))


def _copy(_: Instruction, operands: Sequence[Any]) -> Steps:
    return Steps({"broadcast": math.ceil(operands[0].bytes / 256)})


_STEPS: dict[str, Callable[[Instruction, Sequence[Any]], Steps]] = {
    "vcmp": _compare, "vsel": _select, "vcast": _cast, "vreduce": _reduce, "vbrc": _broadcast, "varange": _arange,
    "copy": _copy, "vtranspose": _transpose,
}  # fmt: skip
