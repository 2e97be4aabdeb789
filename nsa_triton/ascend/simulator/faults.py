"""What can be wrong with a program that runs in the simulator."""

from __future__ import annotations

from dataclasses import dataclass

from nsa_triton.errors import NsaError

KINDS = ("race", "undefined", "out of bounds", "flag set twice", "flag left set", "deadlock")


@dataclass(frozen=True)
class Fault:
    """One mistake of the program; `source` is the line of the Triton kernel."""

    kind: str  # one of KINDS
    message: str
    source: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}" + (f" ({self.source})" if self.source else "")


class SimulationError(NsaError, RuntimeError):
    """The program cannot go on: an instruction that is not modelled, an access out of bounds, a deadlock."""

    def __init__(self, message: str, faults: tuple[Fault, ...] = ()) -> None:
        self.faults = faults
        super().__init__(message)


class TooSlowError(SimulationError):
    """The launch takes longer than the caller wants to know."""


class OutOfBoundsError(SimulationError):
    """Bytes that do not lie in the memory. The instruction that wanted them adds its name and source line."""

    def __init__(self, memory: str, first: int, last: int, size: int) -> None:
        super().__init__(f"bytes {first} to {last} of {memory}, which has {size}")


class UnknownInstructionError(SimulationError):
    """An op, or a form of an op, that the simulator does not model."""
