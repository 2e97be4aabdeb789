"""Which sweeps there are, what each of them would try, and about how long that takes."""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nsa_triton
from nsa_triton.ascend.chips import UB_LIMIT
from nsa_triton.errors import ArgumentValueError
from nsa_triton.ops.catalog import Family, families
from nsa_triton.runtime.configs import Config, config_roots, load
from nsa_triton.runtime.launch import Launch
from nsa_triton.tuning.evaluation import choices, evaluate, refusal, shape_to_time, timed_launches, workload_of
from nsa_triton.tuning.journal import Journal, journal_path
from nsa_triton.tuning.planning import Asked, asked_for, default_config, fingerprint
from nsa_triton.tuning.search import Search
from nsa_triton.tuning.space import SPACES, Space
from nsa_triton.tuning.sweep import Candidate, Sweep
from nsa_triton.tuning.timing import Place, place_named, simulated_like
from nsa_triton.workloads import OPS, Shape, workload

Fingerprints = tuple[Any, ...]  # of all launches that are timed


@dataclass(frozen=True)
class Request:
    """Kernels of some ops on some chips; an empty selection means all."""

    ops: Sequence[str] = ()
    chips: Sequence[tuple[str, str | None]] = ()  # with a version of the compiler
    shapes: Sequence[Shape] = ()
    tokens: Sequence[int] = ()
    kernels: Sequence[str] = ()
    ub_limit: int = UB_LIMIT

    def chosen_families(self) -> tuple[Family, ...]:
        found = families(list(self.ops))
        known = [space.kernel for family in found for space in SPACES[family.name]]
        for kernel in self.kernels:
            if kernel not in known:
                raise ArgumentValueError("--kernel", f"one of {', '.join(dict.fromkeys(known))}", repr(kernel))
        return found

    def ops_of(self, family: Family) -> list[str]:
        """The ops of the family that are asked for: by their own names, or all of them."""
        of_family = [op.name for op in family.ops if op.name in OPS]
        named = [op for op in of_family if op in self.ops]
        return named if named and family.name not in self.ops else of_family


@dataclass(frozen=True)
class Planned:
    """A sweep, the look-up whose answer it searches, and what it starts from. Made when its turn comes, because the
    kernels that were tuned before it are part of it."""

    sweep: Sweep
    asked: Asked
    default: Candidate
    twin: Candidate  # sizes that launch the same; the default's own may be cut
    tiles: tuple[Candidate, ...]
    candidates: int  # before arithmetic
    identity: Mapping[str, Any]
    source: str  # a hash of what is timed

    def search(self) -> Search:
        _, place, space = workload_of(self.sweep)
        kind = place.target.kind
        early = winners(space, self.sweep.family, kind, dict(self.asked.key))
        return Search(self.default, self.tiles, space.options(kind), early, self.twin)

    def journal(self, *, fresh: bool = False) -> Journal:
        return Journal(journal_path(self.sweep, self.identity), self.identity, fresh=fresh)


def winners(space: Space, family: str, kind: str, key: Mapping[str, Any]) -> list[Candidate]:
    """What was found for this kernel, whatever it was tuned for: the entries of all targets but the default ones.
    Those whose keys have most in common with this one come first."""
    files = [file for root in config_roots() for file in sorted(root.glob(f"*/{family}.json"))]
    entries = [entry for file in files for entry in load(file) if entry.kernel == space.kernel]
    tuned = [entry for entry in entries if entry.evidence["how"] != "default"]
    tuned.sort(key=lambda entry: -sum(key.get(name) == value for name, value in entry.key.items()))
    found = ({name: entry.tiles[name] for name in space.tiles} for entry in tuned)
    options = (entry.options.get(kind, {}) for entry in tuned)
    return list(dict.fromkeys(map(Candidate.of, found, options)))


def sweeps(request: Request) -> list[Sweep]:
    """Every kernel of every call that is asked for, without the configs of other kernels. One that two ops share is
    tuned once, in the call of the first."""
    found: dict[Sweep, Sweep] = {}
    for family in request.chosen_families():
        calls = itertools.product(request.chips, request.shapes, request.tokens, request.ops_of(family))
        for (chip, version), shape, tokens, op in calls:
            for sweep in _sweeps_of_call(family, op, place_named(chip, version), shape, tokens, request):
                found.setdefault(replace(sweep, op=""), sweep)
    return list(found.values())


def _sweeps_of_call(
    family: Family, op: str, place: Place, shape: Shape, tokens: int, request: Request
) -> Iterator[Sweep]:
    shape = shape_to_time(op, shape, tokens, place)
    work = workload(op, shape, tokens, device=place.device, filled=False)
    asked = {one.kernel for one in asked_for(work, place)}
    chip, version = place.target.name, place.target.compiler
    for space in SPACES[family.name]:
        if space.kernel in asked and space.kernel in (request.kernels or asked):
            yield Sweep(op, family.name, space.kernel, shape, tokens, chip, version, request.ub_limit)


def plan(sweep: Sweep) -> Planned:
    """What there is to try, now."""
    work, place, space = workload_of(sweep)
    kind = place.target.kind
    (mine,) = (one for one in asked_for(work, place) if one.kernel == sweep.kernel)
    default = _candidate(default_config(mine, place.target), space, kind)
    tiles = [Candidate(tuple(tiles.items()), default.options) for tiles in space.candidates(kind)]
    of_default = _fingerprints(timed_launches(sweep, choices(sweep, default)))
    source = hashlib.sha256(repr(list(of_default)).encode()).hexdigest()[:12]
    identity = {
        "op": sweep.op, "kernel": sweep.kernel, "compiler": sweep.compiler,
        "shape": vars(sweep.shape), "tokens": sweep.tokens, "dtype": str(work.dtype), "batch": work.batch,
        "indices": work.indices, "ub_limit": sweep.ub_limit, "source": source, "host": _host(place.simulated),
        "nsa_triton": nsa_triton.__version__, **place.versions(),
        "chip": simulated_like(sweep.chip) if place.simulated else sweep.chip,
    }  # fmt: skip
    different = _different(sweep, tiles, of_default)
    twin = different.pop(of_default, default)
    return Planned(sweep, mine, default, twin, tuple(different.values()), len(tiles), identity, source)


def default_of(sweep: Sweep) -> Candidate:
    """What the kernel is launched with while nothing is tuned."""
    work, place, space = workload_of(sweep)
    (mine,) = (one for one in asked_for(work, place) if one.kernel == sweep.kernel)
    return _candidate(default_config(mine, place.target), space, place.target.kind)


def _candidate(config: Config, space: Space, kind: str) -> Candidate:
    sizes = {name: config.tiles[name] for name in space.tiles}
    return Candidate.of(sizes, config.options.get(kind, {}))


def _host(simulated: bool) -> str:
    """What is measured belongs to one machine; what is simulated does not."""
    return "" if simulated else platform.node()


def _different(sweep: Sweep, tiles: Iterable[Candidate], of_default: Fingerprints) -> dict[Fingerprints, Candidate]:
    """The first of each that launch the same, by what they launch. Arithmetic lets them pass; the default is never
    refused, and so neither are those like it."""
    first: dict[Fingerprints, Candidate] = {}
    for candidate in tiles:
        launches = timed_launches(sweep, choices(sweep, candidate))
        found = _fingerprints(launches)
        if found not in first and (found == of_default or not refusal(sweep, launches)):
            first[found] = candidate
    return first


def _fingerprints(launches: Iterable[Launch]) -> Fingerprints:
    return tuple(fingerprint(launch) for launch in launches)


@dataclass(frozen=True)
class Estimate:
    """Of one sweep: candidates, those that arithmetic and sameness leave, what options add, and what is known."""

    sweep: Sweep
    candidates: int
    left: int
    options: int
    known: int
    seconds_each: float

    @property
    def seconds(self) -> float:
        """At most, for one worker: candidates that a compiler refuses take less."""
        return (self.left + self.options - self.known) * self.seconds_each


def estimate(sweep: Sweep) -> Estimate:
    """The time of a candidate is that of those that are known; of the default, which is tried for that, if none is."""
    planned = plan(sweep)
    search = planned.search()
    with planned.journal() as journal:
        if not journal.verdicts:
            journal.note(planned.default, evaluate(planned.sweep, planned.default))
        known = [verdict for candidate, verdict in journal.verdicts.items() if search.has(candidate)]
        spent = [verdict.seconds for verdict in known] or [0.0]
    left = 1 + len(planned.tiles)
    return Estimate(sweep, planned.candidates, left, search.total - left, len(known), sum(spent) / len(spent))
