"""Finds what the order of flags and barriers does not guarantee, and values that come from bytes nobody wrote.

Order: every pipe of every core of a block is a thread. `known[pipe][thread]` says how many instructions of `thread`
surely are done when the next one of `pipe` starts; only flags and barriers raise it, so two instructions of one pipe
are not ordered by themselves (that is what `pipe_barrier` is for), but for the scalar unit, which works in order and
issues everything, and for the cube, which accumulates in order; other pipes learn of that only by flags, too. Every 32
bytes of a memory remember their last writer and last readers; an access that those are not known to precede is a race.
Blocks of a launch are never ordered: bytes of a tensor that two blocks use, one of them writing, are a race too.

Values: every byte knows whether it was written. A result is defined if all that it was made of is, or if a select did
not choose the rest; garbage in lanes that nobody looks at is no fault. It is one where it reaches a tensor of the
launch, or the scalar unit, which may branch on it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nsa_triton.ascend.simulator.faults import Fault
from nsa_triton.ascend.simulator.instruction import PIPES, Instruction
from nsa_triton.ascend.simulator.memory import BITS, BLOCK, Memory, View, from_fractals, to_fractals
from nsa_triton.ascend.simulator.tiles import in_blocks

if TYPE_CHECKING:
    from nsa_triton.ascend.simulator.core import Core

THREADS = 3 * len(PIPES)  # one cube core and two vector cores
IN_ORDER = ("S", "M")
SEVERAL = -2  # blocks
SHARED = ("tensor", "workspace")  # memories that all cores of a launch use
_MOST_FAULTS = 1000


class Shadow:
    """Who used each granule of a memory last."""

    def __init__(self, memory: Memory) -> None:
        self.granule = 2 if memory.kind in SHARED else BLOCK
        count = -(-len(memory.data) // self.granule)
        self.writer = np.full(count, -1, np.int32)  # a thread of the block
        self.written = np.zeros(count, np.int64)  # its how manieth instruction
        self.by = np.full(count, -1, np.int32)  # and which one: an index of Checker.log
        self.reads: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by thread: how manieth, and which
        self.writer_block = np.full(count, -1, np.int32)  # tensors only
        self.reader_block = np.full(count, -1, np.int32)

    def reads_of(self, thread: int) -> tuple[np.ndarray, np.ndarray]:
        found = self.reads.get(thread)
        if found is None:
            count = len(self.writer)
            found = self.reads[thread] = np.zeros(count, np.int64), np.full(count, -1, np.int32)
        return found


class Checker:
    """Watches all cores of a launch. `faults` counts the distinct ones."""

    def __init__(self) -> None:
        self.faults: Counter[Fault] = Counter()
        self.log: list[tuple[str, Instruction]] = []  # what shadows refer to
        self._log_index: dict[tuple[str, int], int] = {}
        self._shadows: dict[int, Shadow] = {}
        self._memories: list[Memory] = []  # keeps them alive, as the shadows are found by identity
        self._granules: dict[tuple[Any, ...], np.ndarray | slice] = {}
        self._known: dict[Core, np.ndarray] = {}
        self._count: dict[Core, np.ndarray] = {}

    def watch(self, core: Core) -> None:
        self._known[core] = np.zeros((len(PIPES), THREADS), np.int64)
        self._count[core] = np.zeros(len(PIPES), np.int64)
        for memory in core.memories.values():
            memory.follow()

    def block_done(self, cores: Sequence[Core]) -> None:
        """Forget the cores of a block, and the order within it."""
        own = {id(memory) for core in cores for memory in core.memories.values()}
        for key in own:
            self._shadows.pop(key, None)
        self._memories = [memory for memory in self._memories if id(memory) not in own]
        for shadow in self._shadows.values():
            shadow.writer[:] = -1
            shadow.reads.clear()
        for core in cores:
            del self._known[core], self._count[core]

    def fault(self, kind: str, message: str, instruction: Instruction) -> None:
        fault = Fault(kind, message, instruction.source)
        if fault in self.faults or len(self.faults) < _MOST_FAULTS:
            self.faults[fault] += 1

    # ---- order ----

    def release(self, core: Core, pipe: str) -> np.ndarray:
        known, p = self._known[core], PIPES.index(pipe)
        carried: np.ndarray = np.maximum(known[p], known[0])
        carried[_first_thread(core) + p] = self._count[core][p]
        return carried

    def acquire(self, core: Core, pipe: str, carried: np.ndarray) -> None:
        known, p = self._known[core], PIPES.index(pipe)
        np.maximum(known[p], carried, out=known[p])

    def barrier(self, core: Core, pipe: str) -> None:
        pipes = PIPES if pipe == "ALL" else (pipe,)
        carried = [self.release(core, source) for source in pipes]
        for target in pipes:
            for one in carried:
                self.acquire(core, target, one)

    def flag_set_twice(self, core: Core, instruction: Instruction, flag: str) -> None:
        self.fault("flag set twice", f"{flag} of {core.role} is set before the last one was waited for", instruction)

    def _issue(
        self,
        core: Core,
        instruction: Instruction,
        pipe: str,
        reads: Sequence[View],
        writes: Sequence[View],
        *,
        stored: View | None = None,
    ) -> None:
        """One instruction begins: check what it touches against what it knows to be done, and leave its traces.
        `stored` is what a store writes."""
        p, known = PIPES.index(pipe), self._known[core]
        np.maximum(known[p], known[0], out=known[p])  # the scalar unit issues everything, in order
        self._count[core][p] += 1
        for view in reads:
            self._touch(core, instruction, p, view, writing=False)
        for view in writes:
            self._touch(core, instruction, p, view, writing=True, stored=stored)

    def _touch(
        self, core: Core, instruction: Instruction, p: int, view: View, *, writing: bool, stored: View | None = None
    ) -> None:
        if 0 in view.shape:
            return
        view.check_bounds()
        shadow = self._shadow(view.memory)
        at = self._touched(shadow, view)
        thread, known, who = _first_thread(core) + p, self._known[core][p], self._log_of(core, instruction)
        if view.memory.kind in SHARED:
            self._touch_shared(core, instruction, shadow, at, view, writing)
        repeats = stored is not None and self._repeats(shadow, at, thread, who, stored, view)
        self._check_order(core, instruction, shadow, at, view, writing, repeats, thread, known)
        if writing and not repeats:
            shadow.writer[at], shadow.written[at], shadow.by[at] = thread, self._count[core][p], who
        else:
            counts, by = shadow.reads_of(thread)
            counts[at], by[at] = self._count[core][p], who

    def _repeats(
        self, shadow: Shadow, at: np.ndarray | slice, thread: int, who: int, stored: View, target: View
    ) -> bool:
        """Whether a store finds its own bytes there, from the same instruction of the other vector core: where rows are
        too few to be split, the compilers let both compute and store the same. These two need no order, and for all
        others a store that changes nothing is like a read."""
        if target.memory.kind not in SHARED:
            return False
        writer = shadow.writer[at]
        is_other = (shadow.by[at] == who) & (writer >= 0) & (writer != thread)
        return bool(is_other.all()) and np.array_equal(stored.raw(), target.raw())

    def _check_order(
        self,
        core: Core,
        instruction: Instruction,
        shadow: Shadow,
        at: np.ndarray | slice,
        view: View,
        writing: bool,
        repeats: bool,
        thread: int,
        known: np.ndarray,
    ) -> None:
        writer = shadow.writer[at]
        late = (writer >= 0) & (shadow.written[at] > known[writer])
        if PIPES[thread % len(PIPES)] in IN_ORDER:
            late &= writer != thread
        if late.any() and not repeats:
            other = shadow.by[at][late][0]
            self._race(core, instruction, view, writing, other, "wrote")
        if not writing:
            return
        for reader, (counts, by) in shadow.reads.items():
            late = counts[at] > known[reader]
            if reader != thread and late.any():  # a pipe reads in order, and an instruction reads before it writes
                self._race(core, instruction, view, writing, by[at][late][0], "read")

    def _touch_shared(
        self, core: Core, instruction: Instruction, shadow: Shadow, at: np.ndarray | slice, view: View, writing: bool
    ) -> None:
        """Blocks run in any order: what one writes is not for another to use in the same launch."""
        writers, readers = shadow.writer_block[at], shadow.reader_block[at]
        if ((writers >= 0) & (writers != core.block)).any():
            did = "write" if writing else "reads what another writes of"
            self.fault("race", f"{instruction}: two blocks {did} the same bytes of {view.memory.name}", instruction)
        if writing:
            if ((readers != -1) & (readers != core.block)).any():
                message = f"{instruction}: writes bytes of {view.memory.name} that another block reads"
                self.fault("race", message, instruction)
            shadow.writer_block[at] = core.block
        else:
            shadow.reader_block[at] = np.where((readers == -1) | (readers == core.block), core.block, SEVERAL)

    def _race(self, core: Core, instruction: Instruction, view: View, writing: bool, other: int, did: str) -> None:
        role, before = self.log[other]
        does = "writes" if writing else "reads"
        self.fault(
            "race",
            f"{instruction} of {core.role} {does} {view.memory.name} while {before} of {role} ({before.source}), which "
            f"{did} the same bytes, may still run",
            instruction,
        )

    def _shadow(self, memory: Memory) -> Shadow:
        found = self._shadows.get(id(memory))
        if found is None:
            found = self._shadows[id(memory)] = Shadow(memory)
            self._memories.append(memory)
        return found

    def _touched(self, shadow: Shadow, view: View) -> np.ndarray | slice:
        """The granules in which a view has elements: a slice where they lie side by side."""
        key = (view.offset, view.shape, view.strides, view.dtype, shadow.granule)
        found = self._granules.get(key)
        if found is None:
            found = self._granules[key] = granules(view, shadow.granule)
        return found

    def _log_of(self, core: Core, instruction: Instruction) -> int:
        key = (core.role, id(instruction))
        if key not in self._log_index:
            self._log_index[key] = len(self.log)
            self.log.append((core.role, instruction))
        return self._log_index[key]

    # ---- instructions ----

    def tile(
        self,
        core: Core,
        instruction: Instruction,
        operands: Sequence[Any],
        reads: Sequence[View],
        writes: Sequence[View],
    ) -> None:
        if instruction.name == "mmadL1":  # its reads of L1 came before, by MTE1
            self._issue(core, instruction, "M", [v for v in reads if v.memory.kind == "L0C"], writes)
        else:
            stored = operands[0] if instruction.name == "store" else None
            self._issue(core, instruction, instruction.pipe, reads, writes, stored=stored)
        self._follow(core, instruction, operands, reads, writes)

    def feed(self, core: Core, instruction: Instruction, reads: Sequence[View]) -> None:
        """The operands of a product leave L1."""
        self._issue(core, instruction, "MTE1", reads, [])

    def scalar_read(self, core: Core, instruction: Instruction, cell: View) -> None:
        self._issue(core, instruction, "S", [cell], [])
        if not defined(cell).all():
            message = f"{instruction} of {core.role}: the scalar unit reads a value made of bytes that nobody wrote"
            self.fault("undefined", f"{message}, in {cell.memory.name}", instruction)

    def scalar_write(self, core: Core, instruction: Instruction, cell: View) -> None:
        self._issue(core, instruction, "S", [], [cell])
        define(cell, True)

    # ---- values ----

    def _follow(
        self,
        core: Core,
        instruction: Instruction,
        operands: Sequence[Any],
        reads: Sequence[View],
        writes: Sequence[View],
    ) -> None:
        result = _RULES.get(instruction.name, _all_of)(instruction, operands)
        target = operands[0] if instruction.name == "varange" else operands[6 if instruction.name == "mmadL1" else 1]
        if instruction.name not in ("varange", "mmadL1"):
            target = operands[instruction.parts[1]][0]
        for written in writes:  # scratch buffers, and bytes behind the target
            define(written, instruction.name == "load")
        define(target, result)
        if target.memory.kind == "tensor" and not np.all(result):
            message = (
                f"{instruction} of {core.role}: a value made of bytes that nobody wrote reaches {target.memory.name}"
            )
            self.fault("undefined", message, instruction)


def _first_thread(core: Core) -> int:
    return len(PIPES) * (0 if core.role == "AIC" else 1 + core.sub_block)


def granules(view: View, granule: int) -> np.ndarray | slice:
    bits = BITS[view.dtype]
    first, last = view.byte_range()
    run, outer = 1, []  # elements side by side, and the axes around them
    for size, stride in sorted(zip(view.shape, view.strides, strict=True), key=lambda axis: axis[1]):
        if stride == run:
            run *= size
        elif size > 1:
            outer.append((size, stride))
    if not outer:
        return slice(first // granule, -(-last // granule))
    starts = np.array([view.offset], np.int64)
    for size, stride in outer:
        starts = (starts[:, None] + np.arange(size) * stride * bits).ravel()
    ends = (starts + run * bits + 7) // 8
    starts //= 8
    most = math.ceil(run * bits / 8 / granule) + 1
    rows = starts[:, None] // granule + np.arange(most)
    return np.unique(rows[rows * granule < ends[:, None]])


def defined(view: View) -> np.ndarray:
    """Whether each element was written; memories that are not followed are defined everywhere."""
    if view.memory.defined is None or 0 in view.shape:
        return np.ones(view.shape, bool)
    return _flags(view, 0)


def define(view: View, value: Any) -> None:
    if view.memory.defined is None or 0 in view.shape:
        return
    if view.dtype == "i1":
        first, last = view.byte_range()
        view.memory.defined[first:last] = True
    for byte in range(max(1, BITS[view.dtype] // 8)):
        _flags(view, byte)[...] = value


def _flags(view: View, byte: int) -> np.ndarray:
    """The flag of one byte of each element; the elements of i1 have flags of their own."""
    if view.dtype == "i1":
        return np.ndarray(view.shape, bool, view.memory.defined_bits, view.offset, view.strides)
    size = BITS[view.dtype] // 8
    strides = [stride * size for stride in view.strides]
    return np.ndarray(view.shape, bool, view.memory.defined, (view.offset >> 3) + byte, strides)


Rule = Callable[[Instruction, Sequence[Any]], Any]


def _known(operand: Any) -> Any:
    return defined(operand) if isinstance(operand, View) else np.True_


def _all_of(instruction: Instruction, operands: Sequence[Any]) -> Any:
    """Element by element, with broadcasting."""
    result: Any = np.True_
    for operand in operands[instruction.parts[0]]:
        result = np.logical_and(result, _known(operand))
    return result


def _selected(instruction: Instruction, operands: Sequence[Any]) -> Any:
    condition, a, b = operands[instruction.parts[0]]
    chosen = condition.read() if isinstance(condition, View) else bool(condition)
    return np.logical_and(_known(condition), np.where(chosen, _known(a), _known(b)))


def _reduced(instruction: Instruction, operands: Sequence[Any]) -> Any:
    return _known(operands[0]).all(axis=instruction.numbers["reduce_dims"], keepdims=True)


def _as_fractals(_: Instruction, operands: Sequence[Any]) -> Any:
    source, target = operands[0], operands[1]
    matrix = from_fractals(defined(target)).copy()
    rows, columns = source.shape
    matrix[:rows, columns : in_blocks(columns, target)] = True
    matrix[:rows, :columns] = defined(source)
    return to_fractals(matrix, target.shape)


def _as_rows(_: Instruction, operands: Sequence[Any]) -> Any:
    rows, columns = operands[1].shape
    return from_fractals(defined(operands[0]))[:rows, :columns]


def _product(instruction: Instruction, operands: Sequence[Any]) -> Any:
    """A row of the result is known where all of A's row is, a column where all of B's column is."""
    a, b, start, m, k, n, c = operands[:7]
    left, right, whole = (from_fractals(defined(view)) for view in (a, b, c))
    left = left.T if instruction.flag("a_transpose") else left
    right = right.T if instruction.flag("b_transpose") else right
    m = min(-(-m // 16) * 16, left.shape[0], whole.shape[0])
    n = min(-(-n // 16) * 16, right.shape[1], whole.shape[1])
    whole = whole.copy()
    known = np.outer(left[:m, :k].all(1), right[:k, :n].all(0))
    whole[:m, :n] = known if start else known & whole[:m, :n]
    return to_fractals(whole, c.shape)


def _transposed(instruction: Instruction, operands: Sequence[Any]) -> Any:
    return defined(operands[0]).transpose(instruction.numbers["permutation"])


_RULES: dict[str, Rule] = {
    "vsel": _selected, "vreduce": _reduced, "nd2nz": _as_fractals, "fixpipe": _as_rows, "mmadL1": _product,
    "vtranspose": _transposed, "varange": lambda *_: np.True_,
}  # fmt: skip
