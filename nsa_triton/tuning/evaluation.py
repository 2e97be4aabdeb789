"""What one candidate comes to: arithmetic first, then the real compiler, then the clock. What a worker does at once."""

from __future__ import annotations

import functools
import hashlib
import time
from collections.abc import Iterable
from typing import Any

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ascend.simulator.faults import TooSlowError
from nsa_triton.ascend.toolchain import compiler
from nsa_triton.errors import NsaError, ToolchainError
from nsa_triton.runtime.launch import Launch
from nsa_triton.tuning.planning import Choices, asked_for, choosing, default_config, fingerprint, name_of, planned
from nsa_triton.tuning.space import SPACES, Space, disagreement, needs, space_of
from nsa_triton.tuning.sweep import Candidate, Sweep, Verdict
from nsa_triton.tuning.timing import Place, place_named, timed
from nsa_triton.workloads import Shape, Workload, workload


def workload_of(sweep: Sweep) -> tuple[Workload, Place, Space]:
    work, place = _workload(sweep.op, sweep.shape, sweep.tokens, sweep.chip, sweep.compiler)
    return work, place, space_of(sweep.family, sweep.kernel)


@functools.lru_cache(maxsize=1)  # tensors of one call may take gigabytes
def _workload(op: str, shape: Shape, tokens: int, chip_name: str, version: str | None) -> tuple[Workload, Place]:
    place = place_named(chip_name, version)
    return workload(op, shape, tokens, device=place.device, filled=not place.simulated), place


def shape_to_time(op: str, shape: Shape, tokens: int, place: Place) -> Shape:
    """Simulating all heads of a long sequence takes minutes; for training attention a part of them is enough. What
    decodes has few rows, and so needs all."""
    trains_attention = "attention" in op and not op.endswith("_infer")
    return shape.part(tokens, selected="select" in op) if place.simulated and trains_attention else shape


def choices(sweep: Sweep, candidate: Candidate) -> list[tuple[str, Candidate]]:
    """The configs of all kernels of the call: what the others ask for may depend on the candidate's tiles.

    Kernels that come later count with their defaults, so that the sweep stays the same one when they are tuned.
    """
    work, place, _ = workload_of(sweep)
    order = [space.kernel for space in SPACES[sweep.family]]
    chosen = [(sweep.kernel, candidate)]
    for one in asked_for(work, place, chosen[:1]):
        later = order.index(one.kernel) > order.index(sweep.kernel)
        config = default_config(one, place.target) if later else one.found
        chosen.append((one.kernel, Candidate.of(config.tiles, config.options.get(place.target.kind, {}))))
    return chosen


def timed_launches(sweep: Sweep, chosen: Choices) -> list[Launch]:
    """The launches that are compared, those of the candidate's kernel and of kernels that its tiles decide."""
    work, place, space = workload_of(sweep)
    return [launch for launch in planned(work, place, chosen) if name_of(launch) in space.timed]


def refusal(sweep: Sweep, launches: Iterable[Launch]) -> str:
    """Why arithmetic rules these launches out; "" if it does not."""
    work, place, _ = workload_of(sweep)
    for launch in launches:
        name = name_of(launch)
        why = disagreement(name, launch.constexprs)
        if not why and place.is_ascend:
            bound = needs(name, launch.constexprs, work.dtype.itemsize)
            why = bound.refusal(chip(place.target.name), sweep.ub_limit)
        if why:
            return why if name == sweep.kernel else f"{name}: {why}"
    return ""


def evaluate(sweep: Sweep, candidate: Candidate) -> Verdict:
    """Raises only what no candidate is to blame for: a missing tool, a bad argument."""
    began = time.perf_counter()

    def verdict(kind: str, why: str = "", **figures: Any) -> Verdict:
        return Verdict(kind, why, seconds=round(time.perf_counter() - began, 2), **figures)

    work, place, space = workload_of(sweep)
    chosen = choices(sweep, candidate)
    launches = timed_launches(sweep, chosen)
    why = refusal(sweep, launches)
    if why:
        return verdict("limits", why)
    figures: dict[str, Any] = {}
    if place.compiles:
        why, figures = _compiled(sweep, launches)
        if why:
            return verdict("compiler", why, **figures)
    known = dict(sweep.known).get(figures.get("program", ""))
    if known is not None:
        return verdict("timed", us=known, **figures)
    try:
        with choosing(chosen, place.target.kind):
            found = timed(work, place, space.timed, sweep.most_us)
    except ToolchainError:
        raise
    except TooSlowError:
        return verdict("slow", f"takes more than {sweep.most_us:.1f} µs", **figures)
    except _refusals() as error:
        return verdict("failed", f"{type(error).__name__}: {error}", **figures)
    return verdict("timed", us=found.us, p20_us=found.p20_us, p80_us=found.p80_us, **figures)


def _refusals() -> tuple[type[Exception], ...]:
    """What is raised for a kernel that a chip cannot run."""
    from triton.errors import TritonError

    return NsaError, RuntimeError, MemoryError, TritonError


def _compiled(sweep: Sweep, launches: Iterable[Launch]) -> tuple[str, dict[str, Any]]:
    """The first problem that the compiler sees; the largest share of the unified buffer, and a digest of the
    programs."""
    version = compiler(sweep.compiler)
    jobs = {
        fingerprint(launch)[0]: Job(launch.specialization(), sweep.chip, version, launch.options, sweep.ub_limit)
        for launch in launches
    }
    reports = compile_many(list(jobs.values()), workers=1)
    problems = [problem for report in reports for problem in report.problems()]
    shares = [report.ub_percent for report in reports if report.fits]
    program = hashlib.sha256(" ".join(report.program for report in reports).encode()).hexdigest()[:12]
    return (problems[0] if problems else ""), {
        "ub_percent": round(max(shares), 1) if shares else None,
        "program": program if all(report.program for report in reports) else "",
    }
