"""The chips that a kernel can be compiled for: Ascend A2 (910B) and A3 (910_93), and the size of their memories.

Core counts and sizes are those that both compilers write into every module for that target (`dlti.target_system_spec`,
from NPUTargetSpec.td of AscendNPU-IR). All chips share one micro-architecture; on A3 a chip is one die, half a package.
"""

from __future__ import annotations

from dataclasses import dataclass

from nsa_triton.errors import ArgumentValueError

UB_LIMIT = 80  # percent of the UB; a kernel that needs more usually fits only because something else was given up


@dataclass(frozen=True)
class Chip:
    """One compile target. The UB belongs to a vector core; L1, L0A, L0B and L0C belong to a cube core. All in bytes."""

    name: str
    cube_cores: int
    vector_cores: int
    ub: int = 192 << 10
    l1: int = 512 << 10
    l0a: int = 64 << 10
    l0b: int = 64 << 10
    l0c: int = 128 << 10

    def memory(self, name: str) -> int:
        """The size of memory "UB", "L1", "L0A", "L0B" or "L0C"."""
        return {"UB": self.ub, "L1": self.l1, "L0A": self.l0a, "L0B": self.l0b, "L0C": self.l0c}[name]


_24_CUBE_CORES = ("910B1", "910B2", "910B2C", "910_9381", "910_9382", "910_9391", "910_9392")
_20_CUBE_CORES = ("910B3", "910B4", "910B4-1", "910_9362", "910_9372")

CHIPS = {
    f"Ascend{model}": Chip(f"Ascend{model}", cube_cores=cores, vector_cores=2 * cores)
    for models, cores in ((_24_CUBE_CORES, 24), (_20_CUBE_CORES, 20))
    for model in models
}


def chip(name: str) -> Chip:
    if name not in CHIPS:
        raise ArgumentValueError("chip", f"one of {', '.join(sorted(CHIPS))}", repr(name))
    return CHIPS[name]


def relatives(name: str) -> tuple[str, ...]:
    """The other chips with the same memories, in which what is tuned for one of them fits too: those with as many
    cores first. None for a name that is not a chip's."""
    if name not in CHIPS:
        return ()
    mine = CHIPS[name]
    others = [other for other in CHIPS.values() if other != mine and _memories(other) == _memories(mine)]
    return tuple(other.name for other in sorted(others, key=lambda other: other.cube_cores != mine.cube_cores))


def _memories(one: Chip) -> tuple[int, ...]:
    return one.ub, one.l1, one.l0a, one.l0b, one.l0c
