"""One core of a running program: its memories, its flags, and the calls that translated code makes.

Instructions take effect in program order. What the hardware may do in another order is found by the checker, which
knows only the order that flags and barriers guarantee; when it happens is computed by the clock. Both are optional.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any

from nsa_triton.ascend.chips import Chip
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.clock import Clock
from nsa_triton.ascend.simulator.faults import OutOfBoundsError, SimulationError
from nsa_triton.ascend.simulator.instruction import Instruction
from nsa_triton.ascend.simulator.memory import BITS, Memory, View
from nsa_triton.ascend.simulator.tiles import accesses, execute

ON_CHIP = {"AIV": ("UB",), "AIC": ("L1", "L0C", "UB")}  # the cube core's UB holds scalars of its own only


class Core:
    def __init__(
        self,
        chip: Chip,
        role: str,
        block: int,
        sub_block: int,
        blocks: int,
        *,
        checker: Checker | None = None,
        clock: Clock | None = None,
        computes: bool = True,
    ) -> None:
        self.role, self.block, self.sub_block, self.blocks = role, block, sub_block, blocks
        self.memories = {name: Memory.on_chip(name, chip.memory(name)) for name in ON_CHIP[role]}
        self.peers: list[Core] = []  # the cores of the other kind in this block
        self.checker, self.clock, self.computes = checker, clock, computes
        self.waits_at: Instruction | None = None  # of another core
        self._waits_for = 0
        self.executed = 0
        self._flags: dict[tuple[str, str, int], deque[Any]] = {}
        self._arrivals: dict[tuple[int, int], deque[Any]] = {}
        self._buffers: dict[tuple[str, str, int, tuple[int, ...]], View] = {}
        if checker is not None:
            checker.watch(self)

    @property
    def name(self) -> str:
        return (
            f"{self.role} {self.sub_block} of block {self.block}"
            if self.role == "AIV"
            else f"AIC of block {self.block}"
        )

    # ---- buffers and elements ----

    def buffer(self, memory: str, dtype: str, address: int, shape: tuple[int, ...]) -> View:
        key = (memory, dtype, address, shape)
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = View(self.memories[memory], dtype, 8 * address, shape)
        return found

    def load(self, instruction: Instruction, view: View, indices: Sequence[int]) -> Any:
        cell = _element(view, indices)
        if self.clock is not None:
            self.clock.scalar_access(instruction, cell)
        self._guarded(instruction, cell.check_bounds)
        if self.checker is not None:
            self.checker.scalar_read(self, instruction, cell)
        value = cell.read()[()]
        return value if cell.dtype[0] in "fb" else int(value)

    def store(self, instruction: Instruction, value: Any, view: View, indices: Sequence[int]) -> None:
        cell = _element(view, indices)
        if self.clock is not None:
            self.clock.scalar_access(instruction, cell)
        self._guarded(instruction, cell.check_bounds)
        if self.checker is not None:
            self.checker.scalar_write(self, instruction, cell)
        cell.write(value)

    # ---- tiles ----

    def tile(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        self.executed += 1
        if instruction.name == "mmadL1":
            self._product_flags(instruction, operands)
            return
        self._run(instruction, operands)

    def _run(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        if self.clock is not None:
            self.clock.tile(instruction, operands)
        self._guarded(instruction, lambda: self._check(instruction, operands))
        if self.computes:
            self._guarded(instruction, lambda: execute(instruction, operands))

    def _check(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        if self.checker is not None:
            self.checker.tile(self, instruction, operands, *accesses(instruction, operands))

    def _product_flags(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        """A product moves its operands from L1 on the way, and with its last operands takes over their flags: events
        to wait for before A and B are read, and to set when they may be overwritten (-1: none)."""
        events = operands[7:11]
        for event in events[:2]:
            if event >= 0:
                self._wait(instruction, "MTE2", "MTE1", event)
        if self.clock is not None:
            self.clock.feed(instruction, operands)
        if self.checker is not None:
            self.checker.feed(self, instruction, [operands[0], operands[1]])
        for event in events[2:]:
            if event >= 0:
                self._set(instruction, "MTE1", "MTE2", event)
        if self.checker is not None:
            self.checker.acquire(self, "M", self.checker.release(self, "MTE1"))
        self._run(instruction, operands)

    def _guarded(self, instruction: Instruction, action: Any) -> Any:
        try:
            return action()
        except OutOfBoundsError as error:
            raise SimulationError(
                f"out of bounds: {instruction} of {self.name} wants {error} ({instruction.source})"
            ) from error

    # ---- order within the core ----

    def set_flag(self, instruction: Instruction, event: int) -> None:
        attributes = instruction.attributes
        if self.clock is not None:
            self.clock.flag()
        self._set(instruction, attributes["set_pipe"][5:], attributes["wait_pipe"][5:], event)

    def wait_flag(self, instruction: Instruction, event: int) -> None:
        attributes = instruction.attributes
        if self.clock is not None:
            self.clock.flag()
        self._wait(instruction, attributes["set_pipe"][5:], attributes["wait_pipe"][5:], event)

    def _set(self, instruction: Instruction, source: str, target: str, event: int) -> None:
        queue = self._flags.setdefault((source, target, event), deque())
        if queue and self.checker is not None:
            self.checker.flag_set_twice(self, instruction, f"{source} to {target}, event {event}")
        queue.append(self._carried(source))

    def _wait(self, instruction: Instruction, source: str, target: str, event: int) -> None:
        queue = self._flags.get((source, target, event))
        if not queue:
            raise SimulationError(
                f"deadlock: {target} of {self.name} waits for a flag of {source}, event {event}, that nobody set "
                f"before ({instruction.source})"
            )
        self._take(target, queue.popleft())

    def barrier(self, instruction: Instruction) -> None:
        pipe = instruction.attributes["pipe"][5:]
        if self.clock is not None:
            self.clock.barrier(pipe)
        if self.checker is not None:
            self.checker.barrier(self, pipe)

    def flags_left(self) -> Iterable[str]:
        """Flags that were set and never waited for, those of other cores among them."""
        for (source, target, event), queue in self._flags.items():
            if queue:
                yield f"{source} to {target}, event {event}"
        for (flag, _), queue in self._arrivals.items():
            if queue:
                yield f"flag {flag} of another core"

    def _carried(self, pipe: str) -> Any:
        """What a flag carries that is set behind the last instruction of `pipe`."""
        time = None if self.clock is None else self.clock.release(pipe)
        return time, None if self.checker is None else self.checker.release(self, pipe)

    def _take(self, pipe: str, carried: Any) -> None:
        time, known = carried
        if self.clock is not None:
            self.clock.acquire(pipe, time)
        if self.checker is not None:
            self.checker.acquire(self, pipe, known)

    # ---- order between the cores of a block ----

    def sync_block_set(self, instruction: Instruction, flag: int) -> None:
        """A flag of the cube core reaches both vector cores."""
        carried = self._carried(instruction.attributes["tpipe"][5:])
        for peer in self.peers:
            peer._arrivals.setdefault((flag, self.sub_block), deque()).append(carried)

    def arrived(self, instruction: Instruction, flag: int) -> bool:
        """Whether the flag is there: the cube core waits for one of each vector core."""
        self.waits_at, self._waits_for = instruction, flag
        if not self.flag_arrived():
            return False
        self.waits_at = None
        return True

    def flag_arrived(self) -> bool:
        return all(self._arrivals.get((self._waits_for, peer.sub_block)) for peer in self.peers)

    def sync_block_wait(self, instruction: Instruction, flag: int) -> None:
        for peer in self.peers:
            time, known = self._arrivals[flag, peer.sub_block].popleft()
            if self.clock is not None:
                time = self.clock.across(time)
            self._take(instruction.attributes["pipe"][5:], (time, known))

    # ---- of timed programs only ----

    def scalar(self, operations: int) -> None:
        if self.clock is not None:
            self.clock.scalar(operations)

    def turn(self, instruction: Instruction) -> float:
        """When this instruction could begin: cores take their turns at the shared memory in this order."""
        return 0.0 if self.clock is None else self.clock.ready(instruction)

    def rounds(self, low: int, high: int, step: int) -> Iterable[int]:
        plain = range(low, high, step)
        return plain if self.clock is None else self.clock.rounds(plain)


def _element(view: View, indices: Sequence[int]) -> View:
    start = sum(index * stride for index, stride in zip(indices, view.strides, strict=True))
    return View(view.memory, view.dtype, view.offset + start * BITS[view.dtype], ())
