"""One search: a kernel of one call on one target, and what a candidate comes to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nsa_triton.ascend.chips import UB_LIMIT
from nsa_triton.workloads import Shape

VERDICTS = ("timed", "slow", "limits", "compiler", "failed")


@dataclass(frozen=True)
class Candidate:
    """Tiles and launch options of a kernel. Hashable, so that it can be looked up."""

    tiles: tuple[tuple[str, int], ...]
    options: tuple[tuple[str, Any], ...] = ()

    @staticmethod
    def of(tiles: Mapping[str, int], options: Mapping[str, Any]) -> Candidate:
        return Candidate(tuple(tiles.items()), tuple(sorted(options.items())))

    def with_options(self, options: Mapping[str, Any]) -> Candidate:
        return Candidate(self.tiles, tuple(sorted(options.items())))

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in (*self.tiles, *self.options))

    def to_json(self) -> dict[str, Any]:
        return {"tiles": dict(self.tiles), "options": dict(self.options)}


@dataclass(frozen=True)
class Verdict:
    """What a candidate comes to.

    verdict      "timed", "slow" (a simulation that was given up), or who refused it: "limits" (arithmetic), "compiler",
                 or "failed" (while it ran)
    why          what the refusal says
    us           simulated, or the median of what was measured; p20_us and p80_us where it was measured
    ub_percent   the share of the unified buffer that it takes, where a compiler said so
    program      a digest of what the compiler made of it
    seconds      that it took to find out
    """

    verdict: str
    why: str = ""
    us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    ub_percent: float | None = None
    program: str = ""
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, "")}


@dataclass(frozen=True)
class Sweep:
    """What is searched. Candidates that take more than `most_us` are not simulated to the end, and programs whose time
    is `known` not at all."""

    op: str
    family: str
    kernel: str
    shape: Shape
    tokens: int
    chip: str  # an Ascend chip, or the name of a target of this machine
    compiler: str | None
    ub_limit: int = UB_LIMIT
    most_us: float = float("inf")
    known: tuple[tuple[str, float], ...] = field(default=())

    def __str__(self) -> str:
        by = f", ascendnpu-ir {self.compiler}" if self.compiler else ""
        return f"{self.kernel} of {self.op}, {self.shape.name} T={self.tokens} on {self.chip}{by}"
