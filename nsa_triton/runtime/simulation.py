"""Let kernels on CPU tensors run in the simulator of an Ascend chip, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nsa_triton.runtime.launch import INSTEAD
from nsa_triton.runtime.target import STAND_IN, ascend_target

if TYPE_CHECKING:
    from nsa_triton.runtime.executors.simulator import SimulatorExecutor


@contextmanager
def simulating(executor: SimulatorExecutor) -> Iterator[SimulatorExecutor]:
    """Ops that are called inside with CPU tensors take `executor`'s chip for their target and run there."""
    chip = executor.chip
    target = STAND_IN.set(ascend_target(chip.name, chip.vector_cores, chip.cube_cores))
    instead = INSTEAD.set(executor)
    try:
        yield executor
    finally:
        STAND_IN.reset(target)
        INSTEAD.reset(instead)
