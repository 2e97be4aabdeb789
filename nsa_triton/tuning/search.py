"""The order in which candidates are tried, so that an early stop is worth something.

The default comes first, then what won elsewhere: on other chips, by other compilers, at other shapes. Then neighbours
of the best so far, with its options, alternate with what lies farthest from all that was tried: two of three candidates
follow the best downhill, and the third keeps the search from ending in a valley. Launch options are tried with the best
tiles only; where one of them wins, tiles that did not fit or were slower without it get another chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from nsa_triton.tuning.space import Options
from nsa_triton.tuning.sweep import Candidate, Verdict

FAR_EVERY = 3  # one of so many candidates is far from all others
FINALISTS = 3  # tiles with which options are tried at last


class Search:
    """`default`, then `early`, then all of `tiles` and options. Verdicts that are known already are handed in by
    `hear`.

    `twin` has the sizes of the grid that launch the same as the default, where its own are cut (columns of a head).
    """

    def __init__(
        self,
        default: Candidate,
        tiles: Sequence[Candidate],
        options: Sequence[Options],
        early: Sequence[Candidate] = (),
        twin: Candidate | None = None,
    ) -> None:
        self.default, self._twin = default, twin or default
        self.options = options
        self.verdicts: dict[Candidate, Verdict] = {}
        self._tiles = list(dict.fromkeys((default, *tiles)))
        self._begun: set[Candidate] = set()
        self._grid = _grid([self._twin, *tiles])
        self._early = [default, *(candidate for candidate in early if self.has(candidate))]

    @property
    def total(self) -> int:
        """The most candidates that will be tried, unless tiles that won with other options lead on."""
        finalists = self._finalists(FINALISTS)
        known = {*self._begun, *self._tiles, *self._early, *self._near()}
        known.update(variant for tiles in finalists for variant in self._variants_of(tiles))
        unknown = min(FINALISTS, len(self._tiles)) - len(finalists)
        return len(known) + unknown * len(self._variants_of(self.default))

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
        return best is not None and all(one in self.verdicts for one in (*self._near(), *self._variants_of(best)))

    def us(self, candidate: Candidate) -> float | None:
        verdict = self.verdicts.get(candidate)
        return None if verdict is None else verdict.us

    def _next(self) -> Candidate | None:
        early = self._pending(self._early)
        if early:
            return early[0]
        pending = self._pending(self._tiles)
        best = self.best
        if pending and (best is None or len(self._begun) % FAR_EVERY == FAR_EVERY - 1):
            return max(pending, key=self._distance_from_all)
        finalists = self._finalists(1 if pending else FINALISTS)
        close = self._pending([*self._near(), *(one for tiles in finalists for one in self._variants_of(tiles))])
        if close:
            return close[0]
        return min(pending, key=lambda one: self._distance(one, best)) if pending and best else None

    def _pending(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        return [candidate for candidate in candidates if candidate not in self._begun]

    def _near(self) -> list[Candidate]:
        """The best, and all tiles one step from it with its options."""
        best = self.best
        if best is None:
            return []
        near = [candidate for candidate in self._tiles if self._distance(candidate, best) <= 1]
        return [candidate.with_options(dict(best.options)) for candidate in near]

    def _finalists(self, most: int) -> list[Candidate]:
        """The best tiles."""
        return list(dict.fromkeys(Candidate(candidate.tiles) for candidate in self.ranked()))[:most]

    def _variants_of(self, candidate: Candidate) -> list[Candidate]:
        variants = [candidate.with_options(options) for options in self.options]
        return [variant for variant in variants if variant.options != self.default.options]

    def _distance_from_all(self, candidate: Candidate) -> int:
        return min(self._distance(candidate, other) for other in self._begun)

    def _distance(self, one: Candidate, other: Candidate) -> int:
        """Steps in the grid of sizes."""
        sizes = dict(self._sizes(other))
        return sum(abs(self._grid[name][size] - self._grid[name][sizes[name]]) for name, size in self._sizes(one))

    def _sizes(self, one: Candidate) -> tuple[tuple[str, int], ...]:
        return (self._twin if one.tiles == self.default.tiles else one).tiles


def _grid(tiles: Sequence[Candidate]) -> Mapping[str, Mapping[int, int]]:
    """Of every tile its sizes, and which of them is the how manieth."""
    sizes: dict[str, set[int]] = {}
    for candidate in tiles:
        for name, size in candidate.tiles:
            sizes.setdefault(name, set()).add(size)
    return {name: {size: place for place, size in enumerate(sorted(of))} for name, of in sizes.items()}
