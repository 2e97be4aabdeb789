"""Run a program on all cores of a chip: bind its arguments, start its blocks, and let cores wait for one another."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsa_triton.ascend.chips import Chip
from nsa_triton.ascend.hivm_module import memref
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.clock import Timing
from nsa_triton.ascend.simulator.core import Core
from nsa_triton.ascend.simulator.faults import Fault, SimulationError
from nsa_triton.ascend.simulator.memory import DTYPES, Memory, View, cast, from_bf16
from nsa_triton.ascend.simulator.translate import CoreCode, Program

LOCKS = 64  # bytes of the sync lock, the second argument of every kernel

Running = tuple[Core, Iterator[Any]]


def run(
    program: Program,
    chip: Chip,
    blocks: int,
    arguments: dict[str, Tensor | int | float],
    checker: Checker | None = None,
) -> None:
    """Compute: all blocks, one after the other, into the tensors among `arguments`."""
    bound = _Arguments(program, blocks, arguments, checker)
    for block in range(blocks):
        team = _team(program, chip, block, blocks, bound, checker=checker)
        _finish(team)
        if checker is not None:
            for core, _ in team:
                _report_left_flags(core, checker)
            checker.block_done([core for core, _ in team])


def time(
    program: Program,
    chip: Chip,
    blocks: int,
    arguments: dict[str, Tensor | int | float],
    timing: Timing,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Let the clock run: all blocks at once, as many at a time as the chip has cores, turns at the memory by time.

    Tiles are not computed, so tensors keep what they hold; elements that the scalar unit reads from them are real.
    """
    bound = _Arguments(program, blocks, arguments, None)
    at_once = min(blocks, chip.cube_cores if program.uses_cube else chip.vector_cores)
    launch, per_block = timing.costs.start_of_blocks(mixed=program.is_mixed)
    teams = [
        _team(program, chip, block, blocks, bound, timing=timing, start=launch + per_block) for block in range(at_once)
    ]
    following = iter(range(at_once, blocks))

    def next_team(free: float) -> list[Running]:
        """The next block, on the cores that the last one left."""
        block = next(following, None)
        if block is None:
            return []
        return _team(program, chip, block, blocks, bound, timing=timing, start=free + per_block)

    _finish_in_time(teams, next_team, progress, timing)


class _Arguments:
    """The arguments of a launch as the program's functions take them: the base of cross-core flags, lock, workspace,
    the kernel's own, and the grid."""

    def __init__(
        self, program: Program, blocks: int, arguments: dict[str, Tensor | int | float], checker: Checker | None
    ) -> None:
        lock = Memory("lock", "workspace", np.zeros(LOCKS, np.uint8))
        workspace = Memory("workspace", "workspace", np.full(program.workspace * blocks + 64, 0xFF, np.uint8))
        if checker is not None:
            workspace.follow()
        scratch = [View(memory, "i8", 0, [len(memory.data)]) for memory in (lock, workspace)]
        types = program.cores[0].types
        given = [_bound(name, value, types[3 + i]) for i, (name, value) in enumerate(arguments.items())]
        self.values = (0, *scratch, *given, blocks, 1, 1)
        if len(self.values) != len(types):
            raise SimulationError(f"the program takes {len(types)} arguments, but {len(self.values)} were bound")


def _bound(name: str, value: Tensor | int | float, type_: str) -> Any:
    shaped = memref(type_)
    if isinstance(value, Tensor):
        if shaped is None:
            raise SimulationError(f"{name} is a tensor, but the program takes {type_}")
        return View(Memory(name, "tensor", _bytes(value)), shaped.element, 0, [value.numel()])
    if type_.startswith("bf"):
        return from_bf16(cast(np.float32(value), "bf16"))[()]
    return DTYPES[type_](value) if type_[0] == "f" else int(value)


def _bytes(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor in place, from its first to its last element, with the gaps that its strides leave."""
    if tensor.numel() == 0:
        return np.zeros(0, np.uint8)
    storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.element_size()
    part: np.ndarray = storage[first : first + extent * tensor.element_size()]
    return part


def _team(
    program: Program,
    chip: Chip,
    block: int,
    blocks: int,
    bound: _Arguments,
    *,
    checker: Checker | None = None,
    timing: Timing | None = None,
    start: float = 0.0,
) -> list[Running]:
    """The cores of one block, each with its program: one of a kind, or one cube core and two vector cores."""
    team = []
    for code in program.cores:
        for sub_block in range(2 if program.is_mixed and code.role == "AIV" else 1):
            clock = None if timing is None else timing.clock(code.role, block, sub_block, start)
            core = Core(
                chip, code.role, block, sub_block, blocks, checker=checker, clock=clock, computes=timing is None
            )
            team.append((core, _start(code, core, bound)))
    for core, _ in team:
        core.peers = [other for other, _ in team if other.role != core.role]
    return team


def _start(code: CoreCode, core: Core, bound: _Arguments) -> Iterator[Any]:
    return (code.run if core.clock is None else code.timed)(core, *bound.values)


def _finish(team: Sequence[Running]) -> None:
    """Let the cores of a block run in turn, each until it waits for another."""
    waiting = list(team)
    while waiting:
        still = [(core, code) for core, code in waiting if next(code, _DONE) is not _DONE]
        if len(still) == len(waiting) and not any(_can_go_on(core) for core, _ in still):
            _deadlock([core for core, _ in still])
        waiting = still


_DONE = object()


def _can_go_on(core: Core) -> bool:
    return core.waits_at is None or core.flag_arrived()


def _deadlock(cores: Sequence[Core]) -> None:
    waits = [
        Fault("deadlock", f"{core.name} waits for another core's flag", core.waits_at.source if core.waits_at else "")
        for core in cores
    ]
    raise SimulationError("deadlock: " + "; ".join(f"{w.message} ({w.source})" for w in waits), tuple(waits))


def _report_left_flags(core: Core, checker: Checker) -> None:
    for flag in core.flags_left():
        checker.faults[Fault("flag left set", f"{flag} of {core.role} is still set when the program ends", "")] += 1


def _finish_in_time(
    teams: Sequence[list[Running]],
    next_team: Callable[[float], list[Running]],
    progress: Callable[[int], None] | None,
    timing: Timing,
) -> None:
    """Resume the core whose next use of the shared memory comes first."""
    queue: list[tuple[float, int, _Turn]] = []
    number = itertools.count()
    at_work: list[_Team] = []
    finished = 0

    def start(running: list[Running]) -> None:
        team = _Team([core for core, _ in running])
        if running:
            at_work.append(team)
        for core, code in running:
            heapq.heappush(queue, (_now(core), next(number), _Turn(core, code, team)))

    for first in teams:
        start(first)
    while queue:
        now, _, member = heapq.heappop(queue)
        timing.require(now)
        turn = next(member.code, _DONE)
        team = member.team
        if turn is None:  # it waits for another core
            team.blocked.append(member)
        elif isinstance(turn, float):
            heapq.heappush(queue, (turn, next(number), member))
        else:
            team.running.remove(member.core)
            timing.working[member.core.role] -= 1
            if not team.running:
                at_work.remove(team)
                finished += 1
                if progress is not None:
                    progress(finished)
                start(next_team(max(_now(core) for core in (member.core, *member.core.peers))))
        for other in [other for other in team.blocked if other.core.flag_arrived()]:
            team.blocked.remove(other)
            heapq.heappush(queue, (_now(other.core), next(number), other))
    if at_work:
        _deadlock([member.core for team in at_work for member in team.blocked])


@dataclass(eq=False)
class _Team:
    """The cores of a block: those that still run, and of these those that wait for another one."""

    running: list[Core]
    blocked: list[_Turn] = field(default_factory=list)


@dataclass(eq=False)
class _Turn:
    core: Core
    code: Iterator[Any]
    team: _Team


def _now(core: Core) -> float:
    return 0.0 if core.clock is None else core.clock.now
