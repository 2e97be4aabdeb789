"""What came of a sweep, and the entry of autotune_configs that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsa_triton.ascend.chips import UB_LIMIT
from nsa_triton.errors import ConfigError
from nsa_triton.tuning.evaluation import workload_of
from nsa_triton.tuning.plans import Planned
from nsa_triton.tuning.search import Search
from nsa_triton.tuning.sweep import Candidate, Sweep


@dataclass(frozen=True)
class Result:
    """What came of a sweep. `best` is the default where nothing better passed; `file` is where the entry was written,
    `problem` why it was not."""

    sweep: Sweep
    default: Candidate
    default_us: float | None
    best: Candidate | None = None
    us: float | None = None
    runners_up: tuple[tuple[Candidate, float], ...] = ()
    tried: int = 0
    left: int = 0  # candidates that were not tried
    settled: bool = False  # whether all that lies next to the fastest were
    refused: Mapping[str, str] = field(default_factory=dict)  # what the gate said of candidates
    file: Path | None = None
    problem: str = ""

    @property
    def wins(self) -> bool:
        return self.best is not None and self.best != self.default

    @property
    def is_worth_keeping(self) -> bool:
        """A default that stays is kept too, once all around it is known: the next sweep need not ask again."""
        return self.wins or (self.best is not None and self.settled)

    @property
    def ratio(self) -> float | None:
        return self.default_us / self.us if self.us and self.default_us else None

    def to_json(self) -> dict[str, Any]:
        sweep = self.sweep
        return {
            "op": sweep.op, "kernel": sweep.kernel, "shape": sweep.shape.name, "tokens": sweep.tokens,
            "chip": sweep.chip, "compiler": sweep.compiler, "default": self.default.to_json(),
            "default_us": self.default_us, "best": self.best and self.best.to_json(), "us": self.us,
            "runners_up": [{**one.to_json(), "us": us} for one, us in self.runners_up],
            "tried": self.tried, "left": self.left, "settled": self.settled, "refused": dict(self.refused),
            "file": str(self.file) if self.file else None, "problem": self.problem,
        }  # fmt: skip


def entry(planned: Planned, search: Search, result: Result, today: str) -> dict[str, Any]:
    """The winner as an entry of a file of configs. Its length is that of the call; merging may lower it to 0."""
    sweep, asked = planned.sweep, planned.asked
    work, place, _ = workload_of(sweep)
    if result.best is None:
        raise ConfigError(f"{sweep}: no candidate works, so there is no entry")
    verdict = search.verdicts[result.best]
    measured = {"p20_us": verdict.p20_us, "p50_us": verdict.us, "p80_us": verdict.p80_us}
    evidence: dict[str, Any] = {
        "how": place.how, "chip": sweep.chip,
        **({"ascendnpu-ir": sweep.compiler} if sweep.compiler else {}), **place.versions(),
        "source": planned.source, "date": today, "us": _rounded(result.us), "default_us": _rounded(result.default_us),
        **({} if place.simulated else {name: _rounded(us) for name, us in measured.items()}),
        "workload": {
            "op": sweep.op, "shape": sweep.shape.name, "heads": sweep.shape.heads, "tokens": sweep.tokens,
            "batch": work.batch, "dtype": str(work.dtype).removeprefix("torch."), "length": asked.length,
        },
        "tried": result.tried, "left": result.left,
        "runners_up": [{**one.to_json(), "us": _rounded(us)} for one, us in result.runners_up],
    }  # fmt: skip
    if verdict.ub_percent is not None and verdict.ub_percent > UB_LIMIT:
        evidence["ub_limit"] = sweep.ub_limit
        evidence["note"] = (
            f"takes {verdict.ub_percent} % of the unified buffer; searched with --ub-limit {sweep.ub_limit}"
        )
    options = {place.target.kind: dict(result.best.options)} if result.best.options else {}
    return {
        "kernel": sweep.kernel, "key": dict(asked.key), "length": asked.length, "tiles": dict(result.best.tiles),
        "options": options, "evidence": evidence,
    }  # fmt: skip


def _rounded(us: float | None) -> float | None:
    return None if us is None else round(us, 2)
