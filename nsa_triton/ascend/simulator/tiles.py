"""What every tile instruction computes, in numpy. docs/simulator.md says where each meaning was read.

An instruction reads all its operands before it writes, as results may overlay operands of another width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nsa_triton.ascend.simulator.faults import UnknownInstructionError
from nsa_triton.ascend.simulator.instruction import Instruction
from nsa_triton.ascend.simulator.memory import BITS, BLOCK, View, cast, from_fractals, to_fractals

Operands = Sequence[Any]  # views, and numbers of the scalar unit
Meaning = Callable[[Instruction, Operands], None]

ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "vadd": np.add, "vsub": np.subtract, "vmul": np.multiply, "vdiv": np.divide,
    "vmax": np.maximum, "vmin": np.minimum, "vabs": np.abs, "vexp": np.exp, "vln": np.log, "vsqrt": np.sqrt,
    "vrec": np.reciprocal, "vrelu": lambda a: np.maximum(a, 0), "vrsqrt": lambda a: 1 / np.sqrt(a),
    "vand": np.bitwise_and, "vor": np.bitwise_or, "vnot": np.invert, "vsel": np.where,
    "vshl": np.left_shift, "vshr": np.right_shift, "vbrc": np.asarray, "copy": np.asarray,
}  # fmt: skip
COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
REDUCTIONS: dict[str, np.ufunc] = {"sum": np.add, "max": np.maximum, "min": np.minimum}
REPEAT = 256  # bytes that the vector unit takes at a time


def values(operands: Operands) -> list[Any]:
    return [operand.read() if isinstance(operand, View) else operand for operand in operands]


def elementwise(instruction: Instruction, operands: Operands) -> None:
    sources, target = values(operands[instruction.parts[0]]), operands[instruction.parts[1]][0]
    result = ELEMENTWISE[instruction.name](*sources)
    if target.memory.kind == "L1" and target.dtype == "f32":  # the fill of L1 takes a number of 16 bits
        result = np.float32(np.float16(result))
    whole = lengthened(instruction, operands)
    if whole.shape != target.shape:
        whole.write(True)
    target.write(result)


def compare(instruction: Instruction, operands: Operands) -> None:
    sources, target = values(operands[instruction.parts[0]]), operands[instruction.parts[1]][0]
    lengthened(instruction, operands).write(True)  # garbage, but for what follows
    target.write(COMPARISONS[instruction.attributes.get("compare_mode", "eq")](*sources))


def lengthened(instruction: Instruction, operands: Operands) -> View:
    """The target of an instruction, with the bits behind a row of i1 that comparisons (whole repeats of 256 bytes) and
    vnot (16 bits) write too."""
    target: View = operands[instruction.parts[1]][0]
    if target.dtype != "i1" or instruction.name not in ("vcmp", "vnot") or len(target.shape) != 1:
        return target
    compared = operands[0].dtype if instruction.name == "vcmp" else "i1"
    step = 2048 // BITS[compared] if instruction.name == "vcmp" else 16
    most = 8 * len(target.memory.data) - target.offset
    return View(target.memory, "i1", target.offset, (min(-(-target.size // step) * step, most),))


def transpose(instruction: Instruction, operands: Operands) -> None:
    operands[1].write(operands[0].read().transpose(instruction.numbers["permutation"]))


def convert(instruction: Instruction, operands: Operands) -> None:
    source, target = values(operands[instruction.parts[0]])[0], operands[instruction.parts[1]][0]
    is_written_so = target.dtype in ("i1", "bf16")  # View.write converts
    target.write(source if is_written_so else cast(source, target.dtype, instruction.attributes["round_mode"]))


def reduce(instruction: Instruction, operands: Operands) -> None:
    source, target = values(operands[instruction.parts[0]])[0], operands[instruction.parts[1]][0]
    function, axes = REDUCTIONS[instruction.attributes["arith"]], instruction.numbers["reduce_dims"]
    if axes == (source.ndim - 1,):
        target.write(over_columns(function, source)[..., None])
    elif axes == (0,):
        target.write(over_rows(function, source)[None])
    else:
        target.write(function.reduce(source, axis=axes, keepdims=True))


def over_rows(function: np.ufunc, rows: np.ndarray) -> np.ndarray:
    """Along the first axis: the first 2^n rows are folded in halves, those behind them added to the first fold."""
    if len(rows) == 1:
        return np.asarray(rows[0])
    whole = 1 << len(rows).bit_length() - 1
    folded = function(rows[: whole // 2], rows[whole // 2 : whole])
    for start in range(whole, len(rows), whole // 2):
        more = rows[start : start + whole // 2]
        folded[: len(more)] = function(more, folded[: len(more)])
    while len(folded) > 1:
        folded = function(folded[: len(folded) // 2], folded[len(folded) // 2 :])
    return np.asarray(folded[0])


def over_columns(function: np.ufunc, rows: np.ndarray) -> np.ndarray:
    """Along the last axis: the columns of each repeat, 64 of 32 bits, are folded as rows are, then neighbours are
    combined within the last one."""
    columns, lanes = rows.shape[-1], REPEAT // rows.dtype.itemsize
    if columns > lanes:
        rows = _fold_groups(function, rows, columns, lanes)
    while rows.shape[-1] > 1:
        odd = rows[..., -1:] if rows.shape[-1] % 2 else rows[..., :0]
        rows = np.concatenate((function(rows[..., 0:-1:2], rows[..., 1::2]), odd), axis=-1)
    return rows[..., 0]


def _fold_groups(function: np.ufunc, rows: np.ndarray, columns: int, lanes: int) -> np.ndarray:
    whole = 1 << (columns // lanes).bit_length() - 1  # groups
    half = max(whole // 2, 1) * lanes
    folded = function(rows[..., :half], rows[..., half : whole * lanes]) if whole > 1 else rows[..., :lanes].copy()
    for start in range(whole * lanes, columns, half):
        more = rows[..., start : start + half]
        width = more.shape[-1]
        folded[..., :width] = function(more, folded[..., :width])
    while folded.shape[-1] > lanes:
        folded = function(folded[..., : folded.shape[-1] // 2], folded[..., folded.shape[-1] // 2 :])
    return folded


def arange(instruction: Instruction, operands: Operands) -> None:
    """offset + sum of index x stride."""
    target, offset, strides = operands[0], operands[instruction.parts[1]], operands[instruction.parts[2]]
    steps = zip(np.indices(target.shape), strides, strict=True)
    target.write(sum(offset) + sum(index * stride for index, stride in steps))


def load(instruction: Instruction, operands: Operands) -> None:
    """Rows of global memory. Each is filled up to a multiple of 32 bytes, with the padding value or 0."""
    source, target = operands[0], operands[1]
    if len(instruction.parts) > 3 and any(operands[instruction.parts[3]]):
        raise UnknownInstructionError(f"{instruction} at {instruction.source}: padding on the left is not modelled")
    if 0 in source.shape:
        return
    data = source.raw().copy()
    whole = padded(target)
    if whole.shape != target.shape:
        whole.write(operands[instruction.parts[2]][0] if "pad_mode" in instruction.attributes else 0)
    target.raw()[...] = data


def store(_: Instruction, operands: Operands) -> None:
    source, target = operands[0], operands[1]
    if 0 not in target.shape:
        target.raw()[...] = source.raw()


def padded(target: View) -> View:
    """`target` with rows lengthened to a multiple of 32 bytes, as far as the next row does not begin before. Elements
    that lie apart are rows of one."""
    if 0 in target.shape or not target.shape:
        return target
    per_block = BLOCK * 8 // BITS[target.dtype]
    if target.strides[-1] != 1:
        apart = target.strides[-1] >= per_block
        shape, strides = (*target.shape, per_block), (*target.strides, 1)
        return View(target.memory, target.dtype, target.offset, shape, strides) if apart else target
    room = target.strides[-2] if len(target.shape) > 1 else len(target.memory.data) * 8 // BITS[target.dtype]
    length = min(-(-target.shape[-1] // per_block) * per_block, room)
    shape = (*target.shape[:-1], max(target.shape[-1], length))
    return View(target.memory, target.dtype, target.offset, shape, target.strides)


def to_l1(_: Instruction, operands: Operands) -> None:
    """Rows of global memory into fractals. A row is filled up to 32 bytes with zeros; rows of the fractals and whole
    blocks of 32 bytes beyond the source keep their bytes."""
    source, target = operands[0].raw(), operands[1]
    matrix = from_fractals(target.raw()).copy()
    rows, columns = source.shape
    matrix[:rows, columns : in_blocks(columns, target)] = 0
    matrix[:rows, :columns] = source
    target.raw()[...] = to_fractals(matrix, target.shape)


def in_blocks(columns: int, fractals: View) -> int:
    """Columns rounded up to whole blocks of 32 bytes."""
    width = fractals.shape[-1]
    return -(-columns // width) * width


def from_l0c(_: Instruction, operands: Operands) -> None:
    """Fractals of the accumulator into rows of global memory, cropped and converted on the way."""
    source, target = operands[0], operands[1]
    rows, columns = target.shape
    target.write(from_fractals(source.read())[:rows, :columns])


def product(instruction: Instruction, operands: Operands) -> None:
    """C (+)= A x B on m x k x n of them; whole fractals of 16 rows and columns are computed."""
    a, b, start, m, k, n, c = operands[:7]
    left, right, whole = (from_fractals(view.read()) for view in (a, b, c))
    left = left.T if instruction.flag("a_transpose") else left
    right = right.T if instruction.flag("b_transpose") else right
    m = min(-(-m // 16) * 16, left.shape[0], whole.shape[0])
    n = min(-(-n // 16) * 16, right.shape[1], whole.shape[1])
    result = left[:m, :k].astype(np.float32) @ right[:k, :n].astype(np.float32)
    whole[:m, :n] = result if start else whole[:m, :n] + result
    c.raw()[...] = to_fractals(whole, c.shape)


MEANING: dict[str, Meaning] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    "vcmp": compare, "vcast": convert, "vreduce": reduce, "varange": arange,
    "vtranspose": transpose, "load": load, "store": store, "nd2nz": to_l1, "fixpipe": from_l0c, "mmadL1": product,
}  # fmt: skip
# Attributes that change a meaning in ways that no kernel here has needed.
_UNMODELLED: dict[str, Callable[[Instruction], bool]] = {
    "transpose": lambda i: any(i.numbers.get("transpose", ())),
    "atomic_kind": lambda i: i.attributes.get("atomic_kind", "none") != "none",
    "pre_quant": lambda i: i.attributes.get("pre_quant", "NO_QUANT") not in ("NO_QUANT", "F322F16", "F322BF16"),
    "arith": lambda i: "arith" in i.attributes and i.attributes["arith"] not in REDUCTIONS,
    "pre_relu": lambda i: i.attributes.get("pre_relu", "NO_RELU") != "NO_RELU",
    "round_mode": lambda i: i.attributes.get("round_mode", "rint") not in ("rint", "floor", "ceil", "trunc"),
    "dma_mode": lambda i: i.attributes.get("dma_mode", "nz2nd") != "nz2nd",
    "pad_mode": lambda i: i.attributes.get("pad_mode", "PadValue") != "PadValue",
    "init_out_buffer": lambda i: i.flag("init_out_buffer"),
    "may_implicit_transpose_with_last_axis": lambda i: i.flag("may_implicit_transpose_with_last_axis"),
}


def check_modelled(instruction: Instruction) -> None:
    """Refuse, before anything runs, what would be executed wrongly."""
    if instruction.name not in MEANING:
        raise UnknownInstructionError(f"{instruction} at {instruction.source}: the simulator does not model this op")
    for attribute, is_unmodelled in _UNMODELLED.items():
        if is_unmodelled(instruction):
            value = instruction.attributes[attribute]
            raise UnknownInstructionError(
                f"{instruction} at {instruction.source}: the simulator does not model {attribute} = {value}"
            )


def execute(instruction: Instruction, operands: Operands) -> None:
    with np.errstate(all="ignore"):
        MEANING[instruction.name](instruction, operands)


def accesses(instruction: Instruction, operands: Operands) -> tuple[list[View], list[View]]:
    """The views that an instruction reads, and those that it writes, scratch buffers among them."""
    if instruction.name == "varange":
        return [], [operands[0]]
    if instruction.name == "mmadL1":
        return [operands[0], operands[1], *([] if operands[2] else [operands[6]])], [operands[6]]
    views = [[v for v in operands[part] if isinstance(v, View)] for part in instruction.parts]
    reads, writes = views[0], [view for part in views[1:] for view in part]
    if instruction.name == "load":
        writes[0] = padded(writes[0])
    elif instruction.name in ("vcmp", "vnot"):
        writes[0] = lengthened(instruction, operands)
    return reads, writes
