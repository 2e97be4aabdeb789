"""How well the simulator finds faults: plant hundreds of them into real programs, and see what it reports.

Each fault is planted into the final module of a kernel (tests/ascend/simulator/mutations.py), which then runs under the
checker. What is reported nowhere, and leaves the results as they were, has to be explained: a second, slower and exact
check of the order, which shares nothing with the checker but the roles of operands, compares every pair of accesses
byte by byte. Where it finds all of them in order, the flag or barrier was redundant in this run. Otherwise, it is a
hole in the checker. Counts differ a little from run to run, as both compilers place buffers differently each time.

    python -m bench.simulator_mutations            # rewrites bench/results/ascend/simulator_mutations.csv
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import nsa_triton
from nsa_triton.ascend.compile import final_module
from nsa_triton.ascend.lower import Specialization, signature_of
from nsa_triton.ascend.simulator.core import Core
from nsa_triton.ascend.simulator.instruction import PIPES, Instruction
from nsa_triton.ascend.simulator.memory import BITS, Memory, View
from nsa_triton.ascend.simulator.tiles import accesses
from nsa_triton.ascend.simulator.translate import Program
from nsa_triton.ascend.toolchain import Compiler, compilers
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from nsa_triton.runtime.simulation import simulating
from tests.ascend.simulator.mutations import CHIP, KINDS, LOCATION, Launched, Mutation, Outcome, observe, sample

from .results import write_table

RESULTS = Path(__file__).parent / "results" / "ascend" / "simulator_mutations.csv"
COLUMNS = ("kernel", "compiler", "kind", "detected by", "count")
PROBE = f'"hivm.hir.pipe_barrier"() <{{pipe = #hivm.pipe<PIPE_PROBE>}}> : () -> (){LOCATION}'
NOT_RUN, IMPLIED, APART, SAME = (
    "unflagged: never executed",
    "unflagged: implied by other flags",
    "unflagged: orders no two accesses to the same bytes",
    "unflagged: all accesses in order, same results",
)
HOLE = "MISSED"


# ---- the kernels ----


class Recorder(SimulatorExecutor):
    """Keeps every launch as it was before it ran."""

    def __init__(self, compiler: Compiler) -> None:
        super().__init__(CHIP, compiler)
        self.launches: list[Launched] = []

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        spec = Specialization(kernel, signature_of(arguments), dict(constexprs))
        text = final_module(spec, CHIP, compiler=self.compiler, options=options)
        before = Launched(spec.name, self.compiler.version, text, programs, dict(arguments))
        self.launches.append(replace(before, arguments=before.fresh()))
        super().launch(kernel, programs, arguments, constexprs, options)


def recorded(compiler: Compiler) -> list[Launched]:
    """One launch of each kernel, small, but with several rounds of every loop."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    recorder = Recorder(compiler)
    with simulating(recorder):
        nsa_triton.nsa_compress(randn(700, 2, 64), randn(32, 2), 32, 16, actual_seq_len=[300, 700], impl="triton")
        nsa_triton.nsa_compress_infer(
            randn(12, 32, 2, 128), randn(32, 2), torch.arange(6, dtype=torch.int32).view(2, 3), 32, 16, 32,
            block_table=torch.arange(12, dtype=torch.int32).view(2, 6), actual_seq_len=[160, 97],
            cache=randn(6, 2, 128), new_tokens=40, impl="triton",
        )  # fmt: skip
        nsa_triton.nsa_compress_attention_infer(
            randn(2, 8, 64), randn(12, 32, 2, 64), randn(12, 32, 2, 64), 0.125, 8, 2, 64, 4, 32, 32, 16,
            block_table=torch.arange(12, dtype=torch.int32).view(2, 6), actual_cmp_seq_kvlen=[170, 33], impl="triton",
        )  # fmt: skip
        ids = torch.tensor([[5, 1, 3, 0], [0, 2, 4, -1]], dtype=torch.int32).view(2, 1, 1, 4)
        nsa_triton.nsa_select_attention_infer(
            randn(2, 1, 4, 64), randn(12, 32, 1, 64), randn(12, 32, 1, 64), ids, 0.125, 4, 1, 32, 4, 32,
            block_table=torch.arange(12, dtype=torch.int32).view(2, 6), actual_seq_kvlen=[190, 150], impl="triton",
        )  # fmt: skip
    return recorder.launches


# ---- the exact order of one run ----


@dataclass(frozen=True)
class Access:
    """A view that an instruction touches. `node` numbers the instructions of a block."""

    node: int
    thread: tuple[int, str]  # which core of the block, and which pipe
    instruction: Instruction
    view: View
    writes: bool
    repeats: bool = False  # what the other vector core has just stored there


@dataclass
class Unit:
    """What one core of a block knows: sets of instructions, as the bits of a number."""

    number: int
    gate: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PIPES, 0))  # done before the pipe goes on
    issued: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PIPES, 0))
    flags: dict[tuple[str, str, int], deque[int]] = field(default_factory=lambda: defaultdict(deque))
    arrivals: dict[tuple[int, int], deque[int]] = field(default_factory=lambda: defaultdict(deque))

    def before(self, pipe: str) -> int:
        """What is done when the next instruction of a pipe begins: the scalar unit issues them all."""
        return self.gate[pipe] | self.gate["S"]

    def release(self, pipe: str) -> int:
        return self.before(pipe) | self.issued[pipe]


class Order:
    """Follows the program of every core, and knows of each instruction all those that surely are done before it.

    Deliberately not how the checker does it: sets of instructions in the place of vector clocks, every byte in the
    place of granules, every pair of accesses in the place of the last ones.
    """

    def __init__(self) -> None:
        self.unordered: list[str] = []
        self.before: list[int] = []  # of all blocks, one after the other
        self.reached = False  # the probe
        self._block = -1
        self._units: dict[Core, Unit] = {}
        self._nodes = 0
        self._accesses: dict[int, list[Access]] = defaultdict(list)  # by memory
        self._bounds: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self._memories: dict[int, Memory] = {}  # keeps them alive
        self._bytes: dict[tuple[Any, ...], np.ndarray] = {}
        self._by_block: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)

    def follow(self, program: Program) -> Program:
        """The same program, which reports to us on its way."""

        def following(run: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
            return lambda core, *values: run(_Follower(core, self), *values)

        return replace(program, cores=tuple(replace(code, run=following(code.run)) for code in program.cores))

    def unit(self, core: Core) -> Unit:
        if core.block != self._block:
            self.finish_block()
            self._block = core.block
        return self._units.setdefault(core, Unit(core.sub_block + (core.role == "AIV")))

    def finish_block(self) -> None:
        for key, accesses_ in self._accesses.items():
            self._compare(accesses_, self._bounds[key])
            if self._memories[key].kind in ("tensor", "workspace"):
                self._add_to_launch(key, accesses_)
        self._units.clear()
        self._accesses.clear()
        self._bounds.clear()
        self._nodes = 0

    def finish(self) -> list[str]:
        """The accesses that nothing orders, of the whole launch."""
        self.finish_block()
        for key, blocks in self._by_block.items():
            written = sum(writes.astype(np.int16) for _, writes in blocks.values())
            for _, (reads, writes) in blocks.items():
                if (reads & (written > writes)).any() or (writes & (written > 1)).any():
                    self.unordered.append(f"two blocks use the same bytes of {self._memories[key].name}")
                    break
        return self.unordered

    # ---- what happens ----

    def instruction(self, core: Core, instruction: Instruction, operands: Sequence[Any]) -> None:
        reads, writes = accesses(instruction, operands)
        unit = self.unit(core)
        if instruction.name != "mmadL1":
            self.issue(core, instruction, instruction.pipe, reads, writes, repeats=_repeats(instruction, operands))
            return
        events = operands[7:11]
        for event in events[:2]:
            if event >= 0 and unit.flags["MTE2", "MTE1", event]:
                unit.gate["MTE1"] |= unit.flags["MTE2", "MTE1", event].popleft()
        self.issue(core, instruction, "MTE1", [operands[0], operands[1]], [])
        for event in events[2:]:
            if event >= 0:
                unit.flags["MTE1", "MTE2", event].append(unit.release("MTE1"))
        unit.gate["M"] |= unit.release("MTE1")
        self.issue(core, instruction, "M", [view for view in reads if view.memory.kind == "L0C"], writes)

    def issue(
        self,
        core: Core,
        instruction: Instruction,
        pipe: str,
        reads: Sequence[View],
        writes: Sequence[View],
        *,
        repeats: bool = False,
    ) -> None:
        unit = self.unit(core)
        unit.gate[pipe] = unit.before(pipe)
        node, self._nodes = self._nodes, self._nodes + 1
        self.before.append(unit.gate[pipe])
        unit.issued[pipe] |= 1 << node
        for view, is_written in [(view, False) for view in reads] + [(view, True) for view in writes]:
            if 0 in view.shape:
                continue
            key = id(view.memory)
            self._memories[key] = view.memory
            access = Access(node, (unit.number, pipe), instruction, view, is_written, repeats)
            self._accesses[key].append(access)
            self._bounds[key].append(view.byte_range())

    def set_flag(self, core: Core, instruction: Instruction, event: int) -> None:
        source, target, unit = *_ends(instruction), self.unit(core)
        unit.flags[source, target, event].append(unit.release(source))

    def wait_flag(self, core: Core, instruction: Instruction, event: int) -> None:
        source, target, unit = *_ends(instruction), self.unit(core)
        if unit.flags[source, target, event]:
            unit.gate[target] |= unit.flags[source, target, event].popleft()

    def barrier(self, core: Core, instruction: Instruction) -> None:
        pipe, unit = instruction.attributes["pipe"][5:], self.unit(core)
        pipes = PIPES if pipe == "ALL" else (pipe,)
        done = 0
        for one in pipes:
            done |= unit.release(one)
        for one in pipes:
            unit.gate[one] |= done

    def sync_block_set(self, core: Core, instruction: Instruction, flag: int) -> None:
        unit = self.unit(core)
        for peer in core.peers:
            done = unit.release(instruction.attributes["tpipe"][5:])
            self.unit(peer).arrivals[flag, unit.number].append(done)

    def sync_block_wait(self, core: Core, instruction: Instruction, flag: int) -> None:
        unit = self.unit(core)
        for peer in core.peers:
            unit.gate[instruction.attributes["pipe"][5:]] |= unit.arrivals[flag, self.unit(peer).number].popleft()

    # ---- what is not in order ----

    def _compare(self, accesses_: list[Access], bounds: list[tuple[int, int]]) -> None:
        first, last = np.array(bounds).T
        start = len(self.before) - self._nodes
        for i, later in enumerate(accesses_):
            done = self.before[start + later.node]
            for j in np.nonzero((first[:i] < last[i]) & (last[:i] > first[i]))[0]:
                earlier = accesses_[j]
                if (earlier.writes or later.writes) and not done >> earlier.node & 1:
                    self._judge(earlier, later)

    def _judge(self, earlier: Access, later: Access) -> None:
        if earlier.node == later.node:
            return
        if earlier.thread == later.thread:
            if later.thread[1] in ("S", "M") or not earlier.writes:
                return  # these work in order, and all pipes read in order
        elif later.repeats and earlier.writes and earlier.instruction is later.instruction:
            return
        if np.intersect1d(self.bytes_of(earlier.view), self.bytes_of(later.view), assume_unique=True).size:
            self.unordered.append(
                f"{later.instruction} ({later.instruction.source}) {'writes' if later.writes else 'reads'} what "
                f"{earlier.instruction} ({earlier.instruction.source}) {'writes' if earlier.writes else 'reads'} in "
                f"{later.view.memory.name}"
            )

    def _add_to_launch(self, key: int, accesses_: list[Access]) -> None:
        size = len(self._memories[key].data)
        reads, writes = np.zeros(size, bool), np.zeros(size, bool)
        for access in accesses_:
            (writes if access.writes else reads)[self.bytes_of(access.view)] = True
        self._by_block[key][self._block] = reads, writes

    def bytes_of(self, view: View) -> np.ndarray:
        key = (view.offset, view.shape, view.strides, view.dtype)
        found = self._bytes.get(key)
        if found is None:
            elements = np.zeros((), np.int64)
            for size, stride in zip(view.shape, view.strides, strict=True):
                elements = elements[..., None] + np.arange(size) * stride
            width = max(1, BITS[view.dtype] // 8)
            first = (view.offset + elements.ravel() * BITS[view.dtype]) >> 3
            found = self._bytes[key] = np.unique((first[:, None] + np.arange(width)).ravel())
        return found


def _ends(instruction: Instruction) -> tuple[str, str]:
    return instruction.attributes["set_pipe"][5:], instruction.attributes["wait_pipe"][5:]


def _repeats(instruction: Instruction, operands: Sequence[Any]) -> bool:
    """Where rows are too few to be split, the compilers let both vector cores compute and store the same."""
    if instruction.name != "store" or operands[1].memory.kind != "workspace":
        return False
    return np.array_equal(operands[0].raw(), operands[1].raw())


class _Follower:
    """Stands for a core, and tells an `Order` what the core is told to do."""

    def __init__(self, core: Core, order: Order) -> None:
        self._core, self._order = core, order

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def tile(self, instruction: Instruction, operands: Sequence[Any]) -> None:
        self._order.instruction(self._core, instruction, operands)
        self._core.tile(instruction, operands)

    def load(self, instruction: Instruction, view: View, indices: Sequence[int]) -> Any:
        self._order.issue(self._core, instruction, "S", [_cell(view, indices)], [])
        return self._core.load(instruction, view, indices)

    def store(self, instruction: Instruction, value: Any, view: View, indices: Sequence[int]) -> None:
        self._order.issue(self._core, instruction, "S", [], [_cell(view, indices)])
        self._core.store(instruction, value, view, indices)

    def set_flag(self, instruction: Instruction, event: int) -> None:
        self._order.set_flag(self._core, instruction, event)
        self._core.set_flag(instruction, event)

    def wait_flag(self, instruction: Instruction, event: int) -> None:
        self._order.wait_flag(self._core, instruction, event)
        self._core.wait_flag(instruction, event)

    def barrier(self, instruction: Instruction) -> None:
        if instruction.attributes["pipe"] == "PIPE_PROBE":
            self._order.reached = True
            return
        self._order.barrier(self._core, instruction)
        self._core.barrier(instruction)

    def sync_block_set(self, instruction: Instruction, flag: int) -> None:
        self._order.sync_block_set(self._core, instruction, flag)
        self._core.sync_block_set(instruction, flag)

    def sync_block_wait(self, instruction: Instruction, flag: int) -> None:
        self._order.sync_block_wait(self._core, instruction, flag)
        self._core.sync_block_wait(instruction, flag)


def _cell(view: View, indices: Sequence[int]) -> View:
    return view.at(sum(index * stride for index, stride in zip(indices, view.strides, strict=True)))


def order_of(launched: Launched, text: str = "") -> Order:
    order = Order()
    observe(launched, text, order.follow)
    order.finish()
    return order


# ---- the campaign ----


@dataclass(frozen=True)
class Trial:
    """One planted fault. `verdict` says how it was detected, or why it did not have to be."""

    kernel: str
    compiler: str
    kind: str
    mutation: str
    verdict: str
    exact: tuple[str, ...]  # what the exact check finds unordered, where the run came to its end
    stopped: bool

    @property
    def detected(self) -> bool:
        return not self.verdict.startswith(("unflagged", HOLE))

    @property
    def missed(self) -> bool:
        return self.verdict.startswith(HOLE)

    @property
    def disagrees(self) -> str:
        """Where the checker and the exact order come to different conclusions about races."""
        if self.stopped or ("race" in self.verdict.split(", ")) == bool(self.exact):
            return ""
        return f"only the exact order: {self.exact[0]}" if self.exact else "only the checker"


def trials(launched: Launched, count: int, seed: int, kinds: Sequence[str] = ()) -> list[Trial]:
    order = Order()
    right = observe(launched, prepare=order.follow)
    if right.error or right.faults or order.finish():
        raise SystemExit(f"{launched.name} has faults of its own: {right.error} {[*right.faults]} {order.unordered}")
    return [tried(launched, mutation, right, order) for mutation in sample(launched.text, count, seed, kinds)]


def tried(launched: Launched, mutation: Mutation, right: Outcome, right_order: Order) -> Trial:
    order = Order()
    outcome = observe(launched, mutation.text, order.follow)
    exact = () if outcome.error else tuple(dict.fromkeys(order.finish()))
    verdict = outcome.detected_by(right) or _explained(launched, mutation, order, right_order)
    known = launched.name, launched.compiler, mutation.kind, str(mutation)
    return Trial(*known, verdict, exact, bool(outcome.error))


def _explained(launched: Launched, mutation: Mutation, order: Order, right: Order) -> str:
    """Why a fault that changes no result and is not reported is none, in this run."""
    if order.unordered:
        return f"{HOLE}: {order.unordered[0]}"
    if not _reached(launched, mutation):
        return NOT_RUN
    if mutation.kind.startswith(("address", "buffer", "view", "load", "instruction moved")):
        return SAME
    return IMPLIED if order.before == right.before else APART


def _reached(launched: Launched, mutation: Mutation) -> bool:
    lines = launched.text.split("\n")
    order = Order()
    observe(launched, "\n".join((*lines[: mutation.line - 1], PROBE, *lines[mutation.line - 1 :])), order.follow)
    return order.reached


def summary(found: Sequence[Trial]) -> Iterator[str]:
    yield f"{'kind':30} planted detected redundant not run missed  rate"
    for kind in (*KINDS, "all"):
        own = [trial for trial in found if kind in (trial.kind, "all")]
        if not own:
            continue
        detected, missed = sum(t.detected for t in own), sum(t.missed for t in own)
        unrun = sum(t.verdict == NOT_RUN for t in own)
        rate = f"{detected / (detected + missed):.0%}" if detected + missed else "-"
        redundant = len(own) - detected - missed - unrun
        yield f"{kind:30} {len(own):7} {detected:8} {redundant:9} {unrun:7} {missed:6} {rate:>5}"


def table(found: Sequence[Trial]) -> list[tuple[Any, ...]]:
    counts = Counter((t.kernel, t.compiler, t.kind, t.verdict.partition(": hivm")[0]) for t in found)
    return [(*key, count) for key, count in sorted(counts.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--count", type=int, default=42, help="faults per kernel and compiler; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="print every fault that was not reported")
    options = parser.parse_args()
    launches = [launched for compiler in compilers() for launched in recorded(compiler)]
    found: list[Trial] = []
    # Forked children would wait for ever for the threads of torch that the parent had.
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        counts, seeds = [options.count] * len(launches), [options.seed] * len(launches)
        for launched, done in zip(launches, pool.map(trials, launches, counts, seeds), strict=True):
            found += done
            print(f"{launched.name} {launched.compiler}: {sum(t.detected for t in done)} of {len(done)}", flush=True)
    for trial in found:
        if trial.disagrees or trial.missed or (options.verbose and not trial.detected):
            print(trial.kernel, trial.compiler, trial.mutation, "->", trial.verdict, trial.disagrees)
    write_table(options.output, [COLUMNS, *table(found)])
    print(*summary(found), sep="\n")
    sys.exit(any(trial.missed for trial in found))


if __name__ == "__main__":
    main()
