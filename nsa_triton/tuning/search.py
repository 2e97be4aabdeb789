"""The order in which candidates are tried, so that an early stop is worth something.

The default comes first, then what won elsewhere: on other chips, by other compilers, at other shapes. Then neighbours
of the best so far alternate with what lies farthest from all that was tried: two of three candidates follow the best
downhill, and the third keeps the search from ending in a valley. Launch options are tried with the best tiles only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nsa_triton.tuning.space import Options
from nsa_triton.tuning.sweep import Candidate, Verdict

FAR_EVERY = 3  # one of so many candidates is far from all others
FINALISTS = 3  # tiles with which options are tried at last


class Search:
    """`default`, then `early`, then all of `tiles` and options. Verdicts that are known already are handed in by
    `hear`."""

    def __init__(
        self,
        default: Candidate,
        tiles: Sequence[Candidate],
        options: Sequence[Options],
        early: Sequence[Candidate] = (),
    ) -> None:
        self.default = default
        self.options = options
        self.verdicts: dict[Candidate, Verdict] = {}
        self._tiles = list(dict.fromkeys((default, *tiles)))
        self._begun: set[Candidate] = set()
        self._grid = _grid(self._tiles)
        self._early = [default, *(candidate for candidate in early if self.has(candidate))]

    @property
    def total(self) -> int:
        """The most candidates that will be tried."""
        of_best = min(FINALISTS, len(self._tiles)) * len(self._variants_of(self.default))
        return len(self._tiles) + of_best + sum(candidate not in self._tiles for candidate in self._early)

    def hear(self, candidate: Candidate, verdict: Verdict) -> None:
        self._begun.add(candidate)
        self.verdicts[candidate] = verdict

    def has(self, candidate: Candidate) -> bool:
        """Whether it belongs to the space, as older journals' may not."""
        plain = candidate.with_options(dict(self.default.options))
        return plain in self._tiles and candidate in (plain, *self._variants_of(plain))

    def next(self) -> Candidate | None:
        """The next candidate to begin; None where all have begun, or nothing is left to be done but wait."""
        found = self._next()
        if found is not None:
            self._begun.add(found)
        return found

    def ranked(self) -> list[Candidate]:
        """All that were timed, the fastest first; of equals the default, then those that were tried first."""
        times = {c: v.us for c, v in self.verdicts.items() if v.verdict == "timed" and v.us is not None}
        return sorted(times, key=lambda c: (times[c], c != self.default))

    @property
    def best(self) -> Candidate | None:
        return next(iter(self.ranked()), None)

    @property
    def settled(self) -> bool:
        """Whether all that lies next to the best, and all of its options, have been tried: nothing near is faster."""
        best = self.best
        if best is None:
            return False
        near = [candidate for candidate in self._tiles if self._distance(candidate, best) <= 1]
        return all(one in self.verdicts for one in (*near, *self._variants_of(best)))

    def us(self, candidate: Candidate) -> float | None:
        verdict = self.verdicts.get(candidate)
        return None if verdict is None else verdict.us

    def _next(self) -> Candidate | None:
        early = next((candidate for candidate in self._early if candidate not in self._begun), None)
        if early is not None:
            return early
        pending = [candidate for candidate in self._tiles if candidate not in self._begun]
        best = self.best
        variants = [] if best is None else self._pending_variants(1 if pending else FINALISTS)
        if not pending:
            return variants[0] if variants else None
        if best is None or len(self._begun) % FAR_EVERY == FAR_EVERY - 1:
            return max(pending, key=self._distance_from_all)
        nearest = min(pending, key=lambda candidate: self._distance(candidate, best))
        return variants[0] if variants and self._distance(nearest, best) > 1 else nearest

    def _pending_variants(self, of_best: int) -> list[Candidate]:
        tiles = list(dict.fromkeys(candidate.tiles for candidate in self.ranked()))[:of_best]
        variants = [variant for sizes in tiles for variant in self._variants_of(Candidate(sizes))]
        return [variant for variant in variants if variant not in self._begun]

    def _variants_of(self, candidate: Candidate) -> list[Candidate]:
        variants = [candidate.with_options(options) for options in self.options]
        return [variant for variant in variants if variant.options != self.default.options]

    def _distance_from_all(self, candidate: Candidate) -> int:
        return min(self._distance(candidate, other) for other in self._begun)

    def _distance(self, one: Candidate, other: Candidate) -> int:
        """Steps in the grid of sizes."""
        sizes = dict(other.tiles)
        return sum(abs(self._grid[name][size] - self._grid[name][sizes[name]]) for name, size in one.tiles)


def _grid(tiles: Sequence[Candidate]) -> Mapping[str, Mapping[int, int]]:
    """Of every tile its sizes, and which of them is the how manieth."""
    sizes: dict[str, set[int]] = {}
    for candidate in tiles:
        for name, size in candidate.tiles:
            sizes.setdefault(name, set()).add(size)
    return {name: {size: place for place, size in enumerate(sorted(of))} for name, of in sizes.items()}
