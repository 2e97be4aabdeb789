"""Run or time ops in the simulator of an Ascend chip, on CPU tensors; no NPU is involved.

with simulating(SimulatorExecutor("Ascend910B2")):
    y = nsa_triton.nsa_compress(x, w, 32, 16)      # computed by the final on-chip program

reports = simulated_times(lambda: nsa_triton.nsa_compress(x, w, 32, 16), "Ascend910B2")
faults = faults_of(lambda: nsa_triton.nsa_compress(x, w, 32, 16), "Ascend910B2")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from nsa_triton.runtime.launch import INSTEAD
from nsa_triton.runtime.target import STAND_IN, ascend_target

if TYPE_CHECKING:
    from nsa_triton.ascend.simulator.faults import Fault
    from nsa_triton.ascend.simulator.report import LaunchReport
    from nsa_triton.ascend.toolchain import Compiler
    from nsa_triton.runtime.executors.simulator import SimulatorExecutor


@contextmanager
def simulating(executor: SimulatorExecutor) -> Iterator[SimulatorExecutor]:
    """Ops that are called inside with CPU tensors take `executor`'s chip for their target and run there."""
    chip = executor.chip
    target = STAND_IN.set(ascend_target(chip, executor.compiler.version))
    instead = INSTEAD.set(executor)
    try:
        yield executor
    finally:
        STAND_IN.reset(target)
        INSTEAD.reset(instead)


def simulated_times(
    call: Callable[[], Any], chip: str, compiler: Compiler | None = None, **more: Any
) -> list[LaunchReport]:
    """What every launch of `call` would take. Nothing is computed: its results hold garbage. `more` goes to the
    SimulatorExecutor."""
    from nsa_triton.runtime.executors.simulator import SimulatorExecutor

    with simulating(SimulatorExecutor(chip, compiler, times=True, **more)) as executor:
        call()
    return executor.reports


def faults_of(call: Callable[[], Any], chip: str, compiler: Compiler | None = None) -> Counter[Fault]:
    """Races, undefined values and misused flags in the programs that `call` runs, and how often each occurred."""
    from nsa_triton.ascend.simulator.checks import Checker
    from nsa_triton.runtime.executors.simulator import SimulatorExecutor

    checker = Checker()
    with simulating(SimulatorExecutor(chip, compiler, checker=checker)):
        call()
    return checker.faults
