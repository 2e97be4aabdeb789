"""Plant faults into the text of a final module, one at a time, and see what a run of it reports.

The text is changed line by line: in the generic form every op is one line. All that is chosen at random comes from the
generator that the caller gives, so a seed says which faults are planted.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.hivm_module import Memref, location_in, memref
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.faults import SimulationError
from nsa_triton.ascend.simulator.machine import run
from nsa_triton.ascend.simulator.translate import DYNAMIC, Program, translate

CHIP = "Ascend910B2"
FAR = 1 << 22  # elements: further than any tensor here reaches
LOCATION = " loc(unknown)"

_OP = re.compile(r'\s*(?:(%[^="]*?) = )?"([\w.]+)"\(([^()]*)\)')
_PIPE = re.compile(r"(set_pipe|wait_pipe|tpipe|pipe) = #hivm\.pipe<PIPE_(\w+)>")
_HOST = re.compile(r'sym_name = "\w+_infer_\w+_function"')
_EVENT = re.compile(r"EVENT_ID(\d)")
_TRANSFERS = {"load": "MTE2", "nd2nz": "MTE2", "store": "MTE3", "fixpipe": "FIX", "mmadL1": "M"}
_NO_WORK = {"pointer_cast", "get_block_idx", "get_sub_block_idx", "get_block_num", "set_mask_norm"} | {
    "set_ffts_base_addr", "set_flag", "wait_flag", "pipe_barrier", "sync_block_set", "sync_block_wait",
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One op of a core's program. `block` is the region that it lies in."""

    index: int
    name: str  # without its dialect
    dialect: str
    results: tuple[str, ...]
    operands: tuple[str, ...]
    text: str
    function: int
    block: int

    @property
    def pipes(self) -> dict[str, str]:
        return dict(_PIPE.findall(self.text))

    @property
    def event(self) -> str:
        """A static event, or the value that names a dynamic one."""
        found = _EVENT.search(self.text)
        return found[1] if found else "".join(self.operands)

    @property
    def works_on(self) -> str:
        """The pipe that an instruction with operands in memory runs on; "" for all other ops."""
        if self.dialect == "memref" and self.name in ("load", "store"):
            return "S"
        if self.dialect != "hivm" or self.name in _NO_WORK:
            return ""
        return _TRANSFERS.get(self.name, "MTE2" if "<cbuf>" in self.text else "V")

    @property
    def buffer(self) -> Memref:
        """What a pointer_cast makes."""
        found = memref(self.text.rpartition("-> ")[2])
        assert found is not None
        return found


class Module:
    """The lines of a module, and those of them that are ops of a core's program."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.ops: list[Line] = []
        self.defined_at: dict[tuple[int, str], int] = {}
        self._read()

    def _read(self) -> None:
        blocks: list[int] = []
        function, blocks_so_far, is_host = -1, 0, False
        for index, line in enumerate(self.lines):
            stripped = line.lstrip()
            if stripped.startswith("})") and blocks:
                blocks.pop()
            elif stripped.startswith("}, {") and blocks:
                blocks_so_far += 1
                blocks[-1] = blocks_so_far
            found = _OP.match(line)
            if found is None:
                continue
            results, name, operands = found.groups()
            if name == "func.func":
                function, is_host = function + 1, _HOST.search(line) is not None
            if len(blocks) > 1 and not is_host:
                self._add(index, name, _values(results), _values(operands), function, blocks[-1])
            if line.endswith("({"):
                blocks_so_far += 1
                blocks.append(blocks_so_far)

    def _add(
        self, index: int, name: str, results: tuple[str, ...], operands: tuple[str, ...], function: int, block: int
    ) -> None:
        dialect, _, short = name.rpartition(".")
        text, family = self.lines[index], dialect.partition(".")[0]
        self.ops.append(Line(index, short, family, results, operands, text, function, block))
        for result in results:
            self.defined_at[function, result.partition(":")[0]] = index

    def named(self, *names: str, dialect: str = "hivm") -> list[Line]:
        return [op for op in self.ops if op.dialect == dialect and op.name in names]

    def block_of(self, line: Line) -> list[Line]:
        return [op for op in self.ops if op.block == line.block]

    def outermost(self, function: int) -> int:
        """The region of a function's body."""
        return next(op.block for op in self.ops if op.function == function)

    def is_ready(self, values: Sequence[str], line: Line) -> bool:
        """Whether all values are defined in front of a line. Arguments of blocks are."""
        return all(self.defined_at.get((line.function, v.partition("#")[0]), -1) < line.index for v in values)


def _values(text: str | None) -> tuple[str, ...]:
    return tuple(value.strip() for value in (text or "").split(",") if value.strip())


@dataclass(frozen=True)
class Mutation:
    """One fault. `edits` says what stands in the place of some lines, `line` (from 1 on) is the first one of them."""

    kind: str
    line: int
    op: str
    source: str  # in the kernel
    detail: str
    module: Module = field(repr=False, compare=False)
    edits: Mapping[int, tuple[str, ...]] = field(repr=False)

    @property
    def text(self) -> str:
        lines = self.module.lines
        return "\n".join(new for i, old in enumerate(lines) for new in self.edits.get(i, (old,)))

    def __str__(self) -> str:
        return f"{self.kind}: {self.op} in line {self.line} ({self.source}){': ' * bool(self.detail)}{self.detail}"


Edits = Mapping[int, tuple[str, ...]]
Planter = Callable[[Module, random.Random], Iterator[tuple[Line, str, Edits]]]
PLANTERS: dict[str, Planter] = {}


def planter(kind: str) -> Callable[[Planter], Planter]:
    def register(function: Planter) -> Planter:
        PLANTERS[kind] = function
        return function

    return register


def mutations(text: str | Module, kind: str, chooser: random.Random) -> list[Mutation]:
    """Every place of a module where a fault of this kind can be planted, and one way of doing it at each."""
    module = Module(text) if isinstance(text, str) else text
    return [
        Mutation(kind, line.index + 1, line.name, location_in(line.text), detail, module, edits)
        for line, detail, edits in PLANTERS[kind](module, chooser)
    ]


def sample(text: str, count: int, seed: int, kinds: Sequence[str] = ()) -> list[Mutation]:
    """`count` different mutations, the kinds in turn."""
    chooser, module = random.Random(seed), Module(text)
    left = {kind: mutations(module, kind, chooser) for kind in kinds or PLANTERS}
    for found in left.values():
        chooser.shuffle(found)
    chosen: list[Mutation] = []
    for kind in cycle(left):
        if len(chosen) == count or not any(left.values()):
            return chosen
        if left[kind]:
            chosen.append(left[kind].pop())
    return chosen


# ---- flags and barriers that are missing ----


def _without(*names: str) -> Planter:
    def plant(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
        for line in module.named(*names):
            yield line, "", {line.index: ()}

    return plant


planter("wait_flag deleted")(_without("wait_flag"))
planter("set_flag deleted")(_without("set_flag"))
planter("barrier deleted")(_without("pipe_barrier"))
planter("sync_block_wait deleted")(_without("sync_block_wait"))
planter("sync_block_set deleted")(_without("sync_block_set"))
planter("load deleted")(_without("load", "nd2nz"))


def _pairs(module: Module) -> Iterator[tuple[Line, Line]]:
    """Flags that are set and next waited for in the same region: set and wait of one static event."""
    flags = module.named("set_flag", "wait_flag", "mmadL1")
    for i, first in enumerate(flags):
        following = (other for other in flags[i + 1 :] if other.name == "mmadL1" or _key(other) == _key(first))
        second = next(following, None)
        if first.name != "set_flag" or second is None or not _EVENT.search(first.text):
            continue
        if second.name == "wait_flag" and second.block == first.block:
            yield first, second


def _key(flag: Line) -> tuple[Any, ...]:
    return flag.function, flag.pipes.get("set_pipe"), flag.pipes.get("wait_pipe"), flag.event


@planter("flag deleted")
def _flag_deleted(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """Set and wait together: nothing is left over, only the order is missing."""
    paired = set()
    for first, second in _pairs(module):
        paired |= {first.index, second.index}
        yield first, "with its wait", {first.index: (), second.index: ()}
    channels = defaultdict(list)
    for flag in module.named("set_flag", "wait_flag"):
        if flag.index not in paired:
            channels[flag.function, flag.pipes["set_pipe"], flag.pipes["wait_pipe"]].append(flag)
    products = {line.function for line in module.named("mmadL1")}
    for (function, source, target), flags in channels.items():
        if function not in products or {source, target} != {"MTE1", "MTE2"}:  # those a product sets and waits for
            yield flags[0], f"all of {source} to {target}", {flag.index: () for flag in flags}


@planter("flag of another pipe")
def _flag_of_another_pipe(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """Set and wait still match, but what is waited for is another pipe."""
    used = {(f.function, f.pipes["set_pipe"], f.pipes["wait_pipe"], f.event) for f in module.named("set_flag")}
    for first, second in _pairs(module):
        source, target = first.pipes["set_pipe"], first.pipes["wait_pipe"]
        free = [
            pipe
            for pipe in ("S", "V", "MTE2", "MTE3")
            if pipe not in (source, target) and (first.function, pipe, target, first.event) not in used
        ]
        if free:
            pipe = chooser.choice(free)
            edits = {flag.index: (_with_pipe(flag.text, "set_pipe", pipe),) for flag in (first, second)}
            yield first, f"{pipe} instead of {source}", edits


@planter("sync_block flag deleted")
def _sync_block_deleted(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """All sets of one flag, and all waits for it: from the cube core to the vector cores, or the other way. Flags that
    are numbered at run time go together, with what sets and waits for them once outside of the loops."""
    lines = module.named("sync_block_set", "sync_block_wait")
    both = sum({line.function for line in lines})
    flags = defaultdict(list)
    for line in lines:
        static = re.search(r"static_flag_id = (\d+)", line.text)
        setter = line.function if line.name == "sync_block_set" else both - line.function
        flags[setter, static[1] if static else ""].append(line)
    outermost = {module.outermost(function) for function in {line.function for line in lines}}
    for (setter, number), group in flags.items():
        once = [] if number else [
            line
            for (other, text), more in flags.items()
            if other == setter and text and {line.block for line in more} <= outermost
            for line in more
        ]  # fmt: skip
        whole = sorted((*group, *once), key=lambda line: line.index)
        yield whole[0], f"flag {number or 'numbered at run time'}", {line.index: () for line in whole}


# ---- flags and barriers that are there, but wrong ----


@planter("set_flag doubled")
def _doubled(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    for line in module.named("set_flag"):
        yield line, "", {line.index: (line.text, line.text)}


@planter("wait for another event")
def _another_event(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    for line in module.named("wait_flag"):
        if _EVENT.search(line.text):
            other = chooser.choice([str(i) for i in range(8) if str(i) != line.event])
            yield line, f"{other} instead of {line.event}", {line.index: (_EVENT.sub(f"EVENT_ID{other}", line.text),)}


@planter("wait of another pipe")
def _another_pipe(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    for line in module.named("wait_flag"):
        end = chooser.choice(("set_pipe", "wait_pipe"))
        other = chooser.choice([p for p in ("S", "V", "MTE2", "MTE3") if p not in line.pipes.values()])
        detail = f"{end} {other} instead of {line.pipes[end]}"
        yield line, detail, {line.index: (_with_pipe(line.text, end, other),)}


@planter("barrier of another pipe")
def _another_barrier(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    for line in module.named("pipe_barrier"):
        other = chooser.choice([p for p in ("V", "MTE2", "MTE3") if p != line.pipes["pipe"]])
        detail = f"{other} instead of {line.pipes['pipe']}"
        yield line, detail, {line.index: (_with_pipe(line.text, "pipe", other),)}


def _with_pipe(text: str, end: str, pipe: str) -> str:
    return re.sub(rf"\b{end} = #hivm\.pipe<PIPE_\w+>", f"{end} = #hivm.pipe<PIPE_{pipe}>", text)


# ---- instructions in another order ----


@planter("instruction before its wait")
def _wait_too_late(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """The next instruction of the waiting pipe, moved in front of the wait or barrier."""
    for line in module.named("wait_flag", "pipe_barrier", "sync_block_wait"):
        pipe = line.pipes.get("wait_pipe", line.pipes.get("pipe", ""))
        behind = [op for op in module.block_of(line) if op.index > line.index and op.works_on]
        held_back = behind if pipe in ("ALL", "S") else [op for op in behind if op.works_on == pipe]
        if held_back:
            after = held_back[0]
            yield line, after.name, {line.index: (), after.index: (after.text, line.text)}


@planter("instruction behind its flag")
def _set_too_early(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """The last instruction of the pipe that sets a flag, moved behind it."""
    for line in module.named("set_flag", "sync_block_set"):
        pipe = line.pipes.get("set_pipe", line.pipes.get("tpipe", ""))
        front = [op for op in module.block_of(line) if op.index < line.index and op.works_on == pipe]
        if front and module.is_ready(line.operands, front[-1]):
            before = front[-1]
            yield line, before.name, {before.index: (line.text, before.text), line.index: ()}


@planter("instruction moved up")
def _moved_up(module: Module, _: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """In front of the instruction that came before it."""
    for line in module.ops:
        front = [op for op in module.block_of(line) if op.index < line.index and op.works_on]
        if line.works_on not in ("", "S") and front and module.is_ready(line.operands, front[-1]):
            before = front[-1]
            yield line, f"in front of {before.name}", {before.index: (line.text, before.text), line.index: ()}


# ---- buffers at other addresses ----


@planter("addresses swapped")
def _addresses_swapped(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """Two pointer_casts of the same memory."""
    casts = module.named("pointer_cast")
    for line in casts:
        others = [c for c in casts if _same_memory(c, line) and c.operands != line.operands]
        if others:
            other = chooser.choice(others)
            edits = {
                line.index: (_with_address(line, other.operands[0]),),
                other.index: (_with_address(other, line.operands[0]),),
            }
            yield line, f"with line {other.index + 1}", edits


@planter("buffers swapped")
def _buffers_swapped(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """Everything at one address with everything at another one."""
    for line, group, groups in _buffers(module):
        others = [other for other in groups if other is not group and _same_memory(other[0], line)]
        if others:
            other = chooser.choice(others)
            edits = {c.index: (_with_address(c, other[0].operands[0]),) for c in group}
            edits |= {c.index: (_with_address(c, line.operands[0]),) for c in other}
            yield line, f"{line.operands[0]} with {other[0].operands[0]}", edits


@planter("buffer moved")
def _buffer_moved(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """All of a buffer to an address at which it overlaps another one."""
    for line, group, groups in _buffers(module):
        others = [other for other in groups if other is not group and _same_memory(other[0], line)]
        if others:
            other = chooser.choice(others)[0]
            shift = 32 * chooser.randrange(max(1, min((other.buffer.bytes or 32) // 32, 8)))
            head: tuple[str, ...] = (
                f'    %moved0 = "arith.constant"() <{{value = {shift} : i64}}> : () -> i64{LOCATION}',
                f'    %moved = "arith.addi"({other.operands[0]}, %moved0) <{{overflowFlags = #arith.overflow<none>}}> '
                f": (i64, i64) -> i64{LOCATION}",
            )
            first = min(group, key=lambda c: c.index)
            edits: dict[int, tuple[str, ...]] = {c.index: (_with_address(c, "%moved"),) for c in group}
            edits[first.index] = (*head, *edits[first.index])
            if all(c.block == first.block or first.block == module.outermost(c.function) for c in group):
                yield line, f"to {other.operands[0]} + {shift}", edits


def _buffers(module: Module) -> Iterator[tuple[Line, list[Line], list[list[Line]]]]:
    groups: dict[tuple[int, str, str], list[Line]] = defaultdict(list)
    for cast in module.named("pointer_cast"):
        groups[cast.function, cast.buffer.memory, cast.operands[0]].append(cast)
    for group in groups.values():
        yield group[0], group, list(groups.values())


def _same_memory(a: Line, b: Line) -> bool:
    return a.function == b.function and a.buffer.memory == b.buffer.memory


def _with_address(cast: Line, value: str) -> str:
    return cast.text.replace(f"({cast.operands[0]})", f"({value})", 1)


# ---- views of other elements ----


@planter("view outside its tensor")
def _view_outside(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    for line in module.named("reinterpret_cast", dialect="memref"):
        yield from _shifted(line, chooser.choice((FAR, -FAR)))


@planter("view shifted")
def _view_shifted(module: Module, chooser: random.Random) -> Iterator[tuple[Line, str, Edits]]:
    """By a few elements: it may still lie in its tensor or buffer."""
    for line in module.named("reinterpret_cast", "subview", dialect="memref"):
        yield from _shifted(line, chooser.choice((1, -1, 8, -8, 16)))


def _shifted(line: Line, by: int) -> Iterator[tuple[Line, str, Edits]]:
    offsets = re.search(r"static_offsets = array<i64: (-?\d+)", line.text)
    if offsets is None:
        return
    if int(offsets[1]) != DYNAMIC:
        new = line.text.replace(offsets[0], f"static_offsets = array<i64: {int(offsets[1]) + by}", 1)
        yield line, f"by {by}", {line.index: (new,)}
        return
    offset = line.operands[1]
    edits = (
        f'%by = "arith.constant"() <{{value = {by} : index}}> : () -> index{LOCATION}',
        f'%shifted = "arith.addi"({offset}, %by) <{{overflowFlags = #arith.overflow<none>}}> '
        f": (index, index) -> index{LOCATION}",
        line.text.replace(f"({line.operands[0]}, {offset}", f"({line.operands[0]}, %shifted", 1),
    )
    yield line, f"by {by}", {line.index: edits}


KINDS = tuple(PLANTERS)


# ---- what a run reports ----


@dataclass(frozen=True)
class Launched:
    """A launch of a kernel: its module, and its arguments as they were before it ran."""

    name: str
    compiler: str
    text: str
    blocks: int
    arguments: Mapping[str, Any]

    def fresh(self) -> dict[str, Any]:
        return {key: value.clone() if isinstance(value, Tensor) else value for key, value in self.arguments.items()}


@dataclass(frozen=True)
class Outcome:
    """What a run ended with: the error that stopped it, the faults that the checker found, and the tensors."""

    error: str
    faults: Mapping[Any, int]
    tensors: Mapping[str, Tensor]

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted({fault.kind for fault in self.faults}))

    def detected_by(self, right: Outcome) -> str:
        """How the fault shows, given what the unmutated module computes; "" if it does not."""
        found = [self.error.partition(":")[0]] if self.error else []
        found += [kind for kind in self.kinds if kind not in found]
        if not found and not self.equals(right):
            found = ["wrong numbers"]
        return ", ".join(found)

    def equals(self, other: Outcome) -> bool:
        return all(_same(tensor, other.tensors[name]) for name, tensor in self.tensors.items())


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def observe(launched: Launched, text: str = "", prepare: Callable[[Program], Program] = lambda p: p) -> Outcome:
    """Run a launch, or `text` in the place of its module, under the checker."""
    checker, arguments, error = Checker(), launched.fresh(), ""
    try:
        run(prepare(translate(text or launched.text)), chip(CHIP), launched.blocks, arguments, checker)
    except SimulationError as stopped:
        error = str(stopped)
    except Exception as crash:  # noqa: BLE001 - a program as wrong as this may fail anywhere, and must fail well
        error = f"crash of the simulator: {type(crash).__name__}: {crash}"
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    return Outcome(error, checker.faults, tensors)
