"""All of it: the sweeps, one after the other, and what came of each."""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from nsa_triton.errors import ConfigError, ToolchainError
from nsa_triton.tuning.evaluation import evaluate, workload_of
from nsa_triton.tuning.gate import slower_when_longer, what_is_wrong
from nsa_triton.tuning.journal import RIGHT, Journal
from nsa_triton.tuning.merge import merge
from nsa_triton.tuning.plans import Planned, plan
from nsa_triton.tuning.result import Result, entry
from nsa_triton.tuning.search import Search
from nsa_triton.tuning.sweep import Candidate, Sweep, Verdict
from nsa_triton.tuning.timing import place_named
from nsa_triton.tuning.workers import Workers
from nsa_triton.tuning.workers import workers as team

RUNNERS_UP = 5
SLOW = 1.5  # times the best: what takes longer need not be simulated to its end
MARGIN = 1.02  # the default takes at least so many times as long as a winner; less says little
TURNS = 3  # in which the best of a measured sweep are measured again, against the default


class Progress(Protocol):
    """Who is told how it goes."""

    def begin(self, sweep: Sweep, search: Search, known: int) -> None: ...

    def heard(self, search: Search, candidate: Candidate, verdict: Verdict) -> None: ...


@dataclass(frozen=True)
class Until:
    """When a sweep ends, if candidates are left: at a time, or once all that lies next to the best is known."""

    end: float = float("inf")
    settled: bool = False

    def reached(self, search: Search) -> bool:
        return time.monotonic() >= self.end or (self.settled and search.settled)


def begin(planned: Planned, journal: Journal, told: Progress) -> Search:
    """The search, with what the journal knows."""
    search = planned.search()
    for candidate, verdict in journal.verdicts.items():
        if search.has(candidate):
            search.hear(candidate, verdict)
    told.begin(planned.sweep, search, len(search.verdicts))
    return search


def finish(
    planned: Planned, search: Search, journal: Journal, workers: Workers, until: Until, told: Progress
) -> dict[Candidate, float]:
    """Run the search to its end, and return the final times. Those of what is measured again may make another candidate
    the best; then it has to settle there."""
    while True:
        run(planned, search, journal, workers, until, told)
        times = _final_times(planned, search)
        if not until.settled or search.best is None or until.reached(search):
            return times


def run(planned: Planned, search: Search, journal: Journal, workers: Workers, until: Until, told: Progress) -> None:
    """Try candidates until none is left, or it is to end. What was begun is waited for."""
    running: dict[Future[Verdict], Candidate] = {}
    while True:
        while len(running) < workers.size and not until.reached(search):
            following = search.next()
            if following is None:
                break
            running[workers.submit(_told(planned.sweep, search, following), following)] = following
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            candidate, verdict = running.pop(future), _result(future)
            journal.note(candidate, verdict)
            search.hear(candidate, verdict)
            told.heard(search, candidate, verdict)


def _told(sweep: Sweep, search: Search, candidate: Candidate) -> Sweep:
    """With what is known so far that helps to evaluate the candidate. Tiles decide the work of a launch, so the same
    program takes the same time with other options, not with other tiles. What is measured, is."""
    if not place_named(sweep.chip, sweep.compiler).simulated:
        return sweep
    best = search.us(search.best) if search.best else None
    timed = ((one.program, one.us) for other, one in search.verdicts.items() if other.tiles == candidate.tiles)
    known = {program: us for program, us in timed if program and us is not None}
    return replace(sweep, most_us=float("inf") if best is None else SLOW * best, known=tuple(known.items()))


def _result(future: Future[Verdict]) -> Verdict:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise ToolchainError(
            "a worker process was killed, probably for want of memory: pass fewer --workers. The same command goes on "
            "where it was"
        ) from error


def conclude(planned: Planned, search: Search, journal: Journal, times: Mapping[Candidate, float]) -> Result:
    """The best candidate that the gate lets pass, if it is clearly better than the default."""
    ranked = sorted(times, key=lambda one: times[one] / (MARGIN if one == planned.default else 1))
    refused: dict[Candidate, str] = {}
    best = None
    for candidate in ranked:
        twin = next((one for one in refused if _same(one, candidate, times)), None)
        if candidate == planned.default:
            said = RIGHT
        else:
            said = _gate(planned, journal, candidate) if twin is None else refused[twin]
        if said == RIGHT:
            best = candidate
            break
        refused[candidate] = said
    others: list[Candidate] = []
    for one in ranked:
        if one not in refused and not any(_same(one, other, times) for other in (best, *others) if other):
            others.append(one)
    return Result(
        planned.sweep, planned.default, times.get(planned.default), best, times[best] if best else None,
        tuple((one, times[one]) for one in others[:RUNNERS_UP]), len(search.verdicts),
        max(0, search.total - len(search.verdicts)), search.settled,
        {str(one): said for one, said in refused.items()},
    )  # fmt: skip


def _same(one: Candidate, other: Candidate, times: Mapping[Candidate, float]) -> bool:
    """Options that change nothing in the program give the same time to the last digit."""
    return one.tiles == other.tiles and times[one] == times[other]


def _gate(planned: Planned, journal: Journal, candidate: Candidate) -> str:
    if candidate not in journal.gated:
        said = slower_when_longer(planned.sweep, candidate) or what_is_wrong(planned.sweep, candidate)
        journal.note_gate(candidate, said)
    return journal.gated[candidate]


def _final_times(planned: Planned, search: Search) -> dict[Candidate, float]:
    """Simulated times as they are. Measured ones of the best, in turns with the default: a machine that is busy for a
    while must not decide."""
    ranked = search.ranked()
    times = {candidate: search.verdicts[candidate].us or 0.0 for candidate in ranked}
    if workload_of(planned.sweep)[1].simulated or not ranked:
        return times
    finalists = dict.fromkeys((*ranked[: 1 + RUNNERS_UP], *([planned.default] if planned.default in times else [])))
    turns = [{one: evaluate(planned.sweep, one) for one in finalists} for _ in range(TURNS)]
    for candidate in finalists:
        verdicts = sorted((turn[candidate] for turn in turns), key=lambda verdict: verdict.us or float("inf"))
        search.hear(candidate, verdicts[TURNS // 2])
    return {one: us for one in finalists if (us := search.us(one)) is not None}


# ---- all sweeps ----


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """Ctrl-C, with what was found until then."""

    def __init__(self, results: list[Result]) -> None:
        self.results = results


@dataclass(frozen=True)
class Output:
    """Where winners go, and defaults that stay."""

    folder: Path
    force: bool = False

    def keep(self, planned: Planned, search: Search, result: Result) -> Result:
        if not result.is_worth_keeping:
            return result
        sweep = planned.sweep
        made = entry(planned, search, result, datetime.date.today().isoformat())
        try:
            return replace(result, file=merge(self.folder, sweep.chip, sweep.family, made, force=self.force))
        except ConfigError as error:
            return replace(result, problem=str(error))


def tune(
    wanted: Sequence[Sweep],
    output: Output,
    told: Progress,
    *,
    workers: str | None = None,
    minutes: float | None = None,
    settled: bool = False,
    fresh: bool = False,
) -> list[Result]:
    """Search all sweeps, and write every winner as soon as its sweep is over. The time is shared out evenly among the
    sweeps that are left; with `settled` a sweep ends as soon as nothing next to its best is left to try. Raises
    Interrupted, with the results so far, on Ctrl-C."""
    end = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    results: list[Result] = []
    with ExitStack() as stack:
        teams: dict[bool, Workers] = {}
        for number, sweep in enumerate(wanted):
            simulated = place_named(sweep.chip, sweep.compiler).simulated
            if simulated not in teams:
                teams[simulated] = stack.enter_context(team(workers, simulated=simulated))
            now = time.monotonic()
            until = Until(now + (end - now) / (len(wanted) - number), settled)
            planned = plan(sweep)
            with planned.journal(fresh=fresh) as journal:
                search = begin(planned, journal, told)
                interrupted = False
                try:
                    times = finish(planned, search, journal, teams[simulated], until, told)
                except KeyboardInterrupt:
                    interrupted, times = True, _final_times(planned, search)
                results.append(output.keep(planned, search, conclude(planned, search, journal, times)))
            if interrupted:
                raise Interrupted(results)
    return results
