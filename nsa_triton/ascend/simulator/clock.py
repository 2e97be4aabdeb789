"""When things happen: a discrete-event model of the pipes of all cores and of the memory they share.

Every core has a scalar unit, which issues the instructions of its program in order, and pipes, which work on their own
ones in order. An instruction begins when it is issued, when its pipe is free, and when what its pipe had to wait for
has happened. A pipe is busy for the instruction's occupancy; its result is there a latency later. Transfers from and to
global memory also take their share of the bandwidth of the HBM or the L2, in the order of time over all cores.

Long loops whose rounds repeat are sampled: see `Clock.rounds`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsa_triton.ascend.chips import Chip
from nsa_triton.ascend.simulator.checks import granules
from nsa_triton.ascend.simulator.costs import Cost, Costs, Traffic
from nsa_triton.ascend.simulator.faults import TooSlowError
from nsa_triton.ascend.simulator.instruction import PIPES, Instruction
from nsa_triton.ascend.simulator.memory import View

PERIOD = 8  # rounds: a multiple of those after which double and fourfold buffering is back at the same buffers
SAMPLES = 3  # groups of that many rounds, spread over the loop, that stand for the others
SHARED = ("tensor", "workspace")
LINE = 128  # bytes: the unit in which the model remembers what has been read before


@dataclass(frozen=True)
class Event:
    """One instruction on one pipe, in cycles; kept where a trace is wanted."""

    core: str
    pipe: str
    name: str
    source: str
    start: float
    end: float


class SharedMemory:
    """HBM and L2: each serves the requests of all cores in the order in which they come, at its bandwidth. Reads queue
    behind reads and writes behind writes; that both together do not exceed the bandwidth is made sure of for groups of
    rounds that are left out (`Clock.rounds`) and for the whole launch (`least`).

    The first use of a line of a tensor goes to the HBM, and so does one after more than fits in the L2 came from there
    since the use before. The workspace, which is small and used again at once, stays in the L2.
    """

    def __init__(self, costs: Costs, *, warm: bool) -> None:
        self._costs, self._warm = costs, warm
        self._free: dict[tuple[str, str], float] = defaultdict(float)
        self._used: dict[str, np.ndarray] = {}  # of each line: `_fetched` at its last use
        self._fresh: dict[str, float] = {}  # bytes of a tensor that were not used before
        self._patterns: dict[tuple[Any, ...], np.ndarray | slice] = {}
        self._fetched = 0.0  # bytes that came from the HBM
        self.bytes: Counter[tuple[str, str]] = Counter()  # by level and "read" or "write"
        self.service: dict[str, float] = defaultdict(float)  # cycles, by level

    @property
    def least(self) -> float:
        """Cycles that the busier of the two needs for all that it was asked for."""
        return max(self.service.values(), default=0.0)

    def serve(self, traffic: Traffic, start: float, weight: float, asked: dict[str, float]) -> float:
        """When the last byte of a request has passed that begins at `start`. Adds to the cycles that its core `asked`
        of each level."""
        from_hbm = self._share_of_hbm(traffic.view, weight)
        own, end = start, start
        for level, bytes_ in (("HBM", traffic.bytes * from_hbm), ("L2", traffic.bytes * (1 - from_hbm))):
            if bytes_ > 0:
                self.bytes[level, traffic.direction] += round(bytes_ * weight)
                queue, took = (level, traffic.direction), bytes_ / self._costs.shared_rate(level, traffic.direction)
                self._free[queue] = max(self._free[queue], start) + took
                own += bytes_ / self._costs.core_rate(level, traffic)
                end = max(end, self._free[queue])
                self.service[level] += took * weight
                asked[level] += took * weight
        return max(own, end)

    def _share_of_hbm(self, view: View, weight: float) -> float:
        if view.memory.kind == "workspace":
            return 0.0
        name = view.memory.name
        if name not in self._used:
            lines = len(view.memory.data) // LINE + 2
            self._used[name] = np.full(lines, 0.0 if self._warm else -np.inf)
            self._fresh[name] = float(lines * LINE)
        lines_ = self._lines(view)
        last = self._used[name][lines_].copy()
        self._used[name][lines_] = self._fetched
        first = int(np.count_nonzero(np.isneginf(last)))
        gone = int(np.count_nonzero(last < self._fetched - self._costs.l2_bytes)) - first
        # Rounds that are left out use the same lines for the first time at most once.
        fresh = min(first * LINE * weight, self._fresh[name])
        self._fresh[name] -= fresh
        fetched = fresh + gone * LINE * weight
        self._fetched += fetched
        return fetched / (last.size * LINE * weight) if weight else (first + gone) / last.size

    def _lines(self, view: View) -> np.ndarray | slice:
        """The lines of the L2 that a view touches: a pattern, which repeats, moved to where the view begins."""
        line, rest = divmod(view.offset, LINE * 8)
        key = (rest, view.shape, view.strides, view.dtype)
        pattern = self._patterns.get(key)
        if pattern is None:
            pattern = granules(View(view.memory, view.dtype, rest, view.shape, view.strides), LINE)
            self._patterns[key] = pattern
        if isinstance(pattern, slice):
            return slice(pattern.start + line, pattern.stop + line)
        return pattern + line


@dataclass
class Timing:
    """The clocks of one launch, and what they add up to. Times are in cycles of the chip's core clock."""

    chip: Chip
    costs: Costs
    sampled: bool = True
    warm: bool = False  # whether the L2 holds the tensors, as far as they fit, from the beginning
    keeps_events: bool = False
    most_us: float = float("inf")  # a launch that takes longer is given up
    clocks: list[Clock] = field(default_factory=list)
    working: Counter[str] = field(default_factory=Counter)  # cores that have a block now, by kind
    memory: SharedMemory = field(init=False)
    events: list[Event] = field(default_factory=list)
    lines: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # busy cycles by source line
    work: Counter[str] = field(default_factory=Counter)  # multiply-adds of the cube, elements of the vector unit

    def __post_init__(self) -> None:
        self.memory = SharedMemory(self.costs, warm=self.warm)

    def cores(self, role: str) -> int:
        """How many cores of this kind work at a time."""
        most = self.chip.cube_cores if role == "AIC" else self.chip.vector_cores
        return min(most, sum(clock.role == role for clock in self.clocks))

    @property
    def cycles(self) -> float:
        """From the launch to the end of the last block: no less than the shared memory needs."""
        return max([self.memory.least, *(clock.now for clock in self.clocks)])

    def require(self, now: float) -> None:
        """A TooSlowError at a time that is later than anyone wants to know."""
        if now > self.most_us * self.costs.clock_hz / 1e6:
            raise TooSlowError(f"the launch takes more than {self.most_us:.1f} µs")

    def clock(self, role: str, block: int, sub_block: int, start: float) -> Clock:
        self.clocks.append(Clock(self, role, block, sub_block, start))
        self.working[role] += 1
        return self.clocks[-1]


class Clock:
    """The times of one core."""

    def __init__(self, timing: Timing, role: str, block: int, sub_block: int, start: float) -> None:
        self.timing, self.costs, self.role = timing, timing.costs, role
        self.name = f"block {block} {role}{sub_block if role == 'AIV' else ''}"
        self.start = self.issue = start  # of the scalar unit
        self.free = dict.fromkeys(PIPES, start)  # when the next instruction of a pipe may begin
        self.done = dict.fromkeys(PIPES, start)  # when all of its instructions so far have their results
        self.busy = dict.fromkeys(PIPES, 0.0)
        self._lines: set[tuple[int, int]] = set()  # of the scalar unit's cache
        self._piece_count = 1
        self._asked: dict[str, float] = defaultdict(float)  # cycles of the shared memory, by level
        self.weight = 1.0  # how many rounds of sampled loops one round stands for

    @property
    def now(self) -> float:
        return max(self.issue, *self.done.values())

    # ---- instructions ----

    def scalar(self, operations: int) -> None:
        self._scalar_time(operations * self.costs.scalar_operation)

    def _scalar_time(self, cycles: float, instruction: Instruction | None = None) -> None:
        self._record("S", instruction, self.issue, self.issue + cycles)
        self.issue += cycles

    def scalar_access(self, instruction: Instruction, cell: View) -> None:
        """A load holds the scalar unit until the element is there. A line of global memory stays in its cache."""
        line = (id(cell.memory), (cell.offset >> 3) // int(self.costs["cache_line"]))
        cached = cell.memory.kind not in SHARED or line in self._lines
        self._lines.add(line)
        self._scalar_time(self.costs.element(instruction.name, cached), instruction)

    def ready(self, instruction: Instruction) -> float:
        return max(self.issue, self.free[instruction.pipe])

    def tile(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        cost = self.costs.tile(instruction, operands)
        self._scalar_time(cost.issue, instruction)
        pipe = instruction.pipe
        if cost.trips:
            self.issue = max(self.issue, self.done[pipe])
        start = max(self.issue, self.free[pipe])
        end = start + cost.occupancy + cost.trips * self.costs.round_trip
        if cost.traffic is not None:
            end = max(end, self.timing.memory.serve(cost.traffic, start, self.weight, self._asked))
        if instruction.name == "mmadL1":
            end = max(end, self.done["MTE1"] + cost.occupancy / self._piece_count)
        self._finish(instruction, pipe, start, end, cost)
        if cost.trips:
            self.issue = max(self.issue, end)
        if instruction.name == "mmadL1" and operands[12] < 0:  # the template itself waits for the cube to read L0
            self.free["MTE1"] = max(self.free["MTE1"], self.done["M"])
        self._count(cost)

    def feed(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        """A product's operands go from L1 to L0A and L0B piece by piece; the cube starts with the first piece."""
        cost, self._piece_count = self.costs.feed(operands)
        start = max(self.issue, self.free["MTE1"])
        end = start + cost.occupancy
        self._finish(instruction, "MTE1", start, end, cost)
        first_piece = start + cost.occupancy / self._piece_count + cost.latency
        self.free["M"] = max(self.free["M"], first_piece)

    def _finish(self, instruction: Instruction, pipe: str, start: float, end: float, cost: Cost) -> None:
        self.free[pipe] = end
        self.done[pipe] = max(self.done[pipe], end + cost.latency)
        self._record(pipe, instruction, start, end)

    def _record(self, pipe: str, instruction: Instruction | None, start: float, end: float) -> None:
        self.busy[pipe] += (end - start) * self.weight
        if instruction is not None:
            timing = self.timing
            timing.lines[instruction.source] += (end - start) * self.weight
            if timing.keeps_events:
                timing.events.append(Event(self.name, pipe, instruction.name, instruction.source, start, end))

    def _count(self, cost: Cost) -> None:
        if cost.products:
            self.timing.work[f"products of {cost.dtype}"] += int(cost.products * self.weight)
        if cost.elements:
            self.timing.work["elements"] += int(cost.elements * self.weight)

    # ---- order ----

    def release(self, pipe: str) -> float:
        """When all that `pipe` was given so far is done, and the flag is issued."""
        return max(self.issue, self.done[pipe])

    def acquire(self, pipe: str, time: float) -> None:
        if pipe == "S":
            self.issue = max(self.issue, time)
        else:
            self.free[pipe] = max(self.free[pipe], time)

    def across(self, time: float) -> float:
        return time + self.costs.flag_across

    def flag(self) -> None:
        self._scalar_time(self.costs.flag)

    def barrier(self, pipe: str) -> None:
        """Instructions of `pipe` wait for the results of those before; ALL stops the scalar unit too."""
        self._scalar_time(self.costs.flag)
        if pipe == "ALL":
            self.issue = self.now
        else:
            self.free[pipe] = max(self.free[pipe], self.done[pipe])

    # ---- loops ----

    def rounds(self, plain: range) -> Iterator[int]:
        """The rounds of a loop that are executed. Of a long one: the first few, then `SAMPLES` pairs of groups of
        `PERIOD` rounds, spread evenly; the time of a pair's second group is taken again for every group that it stands
        for. In the first one the cores of a block, which are not moved ahead equally far, find back into step: their
        waiting must not be taken again. What is left out is a multiple of the period, so that double buffers and their
        flags go on as if nothing were missing."""
        groups = len(plain) // PERIOD - 1
        if not self.timing.sampled or groups <= 2 * SAMPLES:
            yield from plain
            return
        head = len(plain) - groups * PERIOD
        yield from plain[:head]
        outer, before = self.weight, None
        for sample in range(SAMPLES):
            first, last = groups * sample // SAMPLES, groups * (sample + 1) // SAMPLES
            group, whole = (first + last) // 2, range(first, last)
            at = head + group * PERIOD
            # Rounds of a causal loop grow: with these weights both groups count for the middle of all.
            weight = sum(whole) - len(whole) * (group - 1)
            self.weight = outer * (len(whole) - weight)
            yield from plain[at - PERIOD : at]
            began, asked = self.now, dict(self._asked)
            self.weight = outer * weight
            yield from plain[at : at + PERIOD]
            # The other cores ask as much of the shared memory: a group takes at least as long as that.
            shared = max((self._asked[level] - asked.get(level, 0.0) for level in self._asked), default=0.0)
            least = shared / self.weight * self.timing.working[self.role] if self.weight else 0.0
            took = max(self.now - began, least)
            self.weight = outer
            grows = 0.0 if before is None else (took - before[1]) / (group - before[0])
            rest = len(whole) - 1
            self._shift(rest * took + grows * (sum(whole) - (group - 1) - rest * group) - (self.now - began))
            before = group, took

    def _shift(self, cycles: float) -> None:
        self.issue += cycles
        for pipe in PIPES:
            self.free[pipe] += cycles
            self.done[pipe] += cycles
