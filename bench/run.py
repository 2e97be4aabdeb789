"""Time all providers side by side, in one process and round by round, on inputs that take turns.

`nsa-triton bench` is its command line. What fails its gate is not timed.
"""

from __future__ import annotations

import functools
import platform
import re
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import torch

import nsa_triton
from nsa_triton.ascend.toolchain import compiler, distribution_version, host_problem, require
from nsa_triton.errors import ArgumentValueError, NsaError
from nsa_triton.runtime.simulation import simulated_times
from nsa_triton.runtime.target import target_of
from nsa_triton.workloads import Workload, shape_named, workload

from .cases import DTYPE, Point
from .gate import gate
from .providers import SAME_RESULT, Call, call_of, has_torch_npu
from .rates import rates_of
from .results import ResultFile, Row
from .timing import Clock, percentile

INPUT_SETS = 3
MOST_INPUT_BYTES = 4 << 30  # of all sets together; there are always two
FEWEST_ROUNDS = 5
MOST_ROUNDS = {"cpu": 25}
DEFAULT_ROUNDS = 50
CALLED = ("ours", "reference", "sdpa", "torch_npu")


@dataclass(frozen=True)
class Session:
    """Where and how long to time. `seconds` are those of a point, beyond the fewest rounds."""

    device: torch.device
    seconds: float
    chip: str = "Ascend910B2"  # of the simulator
    fewest_rounds: int = FEWEST_ROUNDS

    @functools.cached_property
    def clock(self) -> Clock:
        return Clock(self.device)

    @functools.cached_property
    def target(self) -> str:
        return target_of(self.device).name

    @functools.cached_property
    def machine(self) -> dict[str, str]:
        """What a reader needs to know of the machine to repeat a measurement."""
        triton = [name for name in ("triton-ascend", "triton") if distribution_version(name)]
        return {
            "target": self.target,
            "device": _device_name(self.device),
            "torch": torch.__version__,
            "triton": ", ".join(f"{name} {distribution_version(name)}" for name in triton),
            "nsa_triton": nsa_triton.__version__,
            "commit": commit(),
        }


def missing_providers(points: Sequence[Point], target: str) -> dict[str, str]:
    """Providers of these points that this machine cannot have, and why."""
    wanted = {provider for point in points for provider in point.providers}
    reasons = {}
    if "torch_npu" in wanted and not has_torch_npu():
        reasons["torch_npu"] = "torch_npu is not installed"
    if "roofline" in wanted and "simulated" not in wanted and rates_of(target) is None:
        reasons["roofline"] = f"bench/rates.py knows no rates of {target}"
    return reasons


def require_any(points: Sequence[Point], missing: Mapping[str, str], asked: Sequence[str]) -> None:
    """What was asked for by name is there, and something is left to do."""
    for provider in asked:
        if provider in missing:
            raise ArgumentValueError("--providers", "providers of this machine", f"{provider}: {missing[provider]}")
    if not any(set(point.providers) - set(missing) for point in points):
        ops = ", ".join(dict.fromkeys(point.op for point in points))
        raise ArgumentValueError("--providers", f"one that has {ops}", ", ".join(asked))


class Progress(Protocol):
    def next(self, what: str) -> None: ...

    def done(self) -> None: ...


def run(
    points: Sequence[Point], session: Session, folder: Path, name: str, *, resume: bool, progress: Progress
) -> tuple[list[Row], list[Path]]:
    """All rows of all points, and the files that they are in."""
    missing = missing_providers(points, session.target)
    kept = [replace(point, providers=tuple(p for p in point.providers if p not in missing)) for point in points]
    if any("ours" in point.providers for point in kept) and session.device.type == "cpu":
        require(host_problem())
    files = {file.path.parent.name: file for file in _files(kept, session, folder, name, resume)}
    for point in kept:
        progress.next(str(point))
        for target, rows in _rows(point, session, files):
            files[target].append(rows)
        progress.done()
    for file in files.values():
        file.finish()
    return [row for file in files.values() for row in file.rows], [file.path for file in files.values()]


def _files(points: Sequence[Point], session: Session, folder: Path, name: str, resume: bool) -> Iterator[ResultFile]:
    if any(_on_device(point, session) for point in points):
        yield ResultFile(folder / session.target, name, resume=resume)
    if any("simulated" in point.providers for point in points):
        yield ResultFile(folder / f"simulated-{session.chip}", name, resume=resume)


def _on_device(point: Point, session: Session) -> tuple[str, ...]:
    """The providers whose rows belong to the device."""
    bound = ("roofline",) if rates_of(session.target) is not None else ()
    return tuple(name for name in point.providers if name in (*CALLED, *bound))


def _rows(point: Point, session: Session, files: dict[str, ResultFile]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of a point that are not in the files yet, with the folder that they belong to."""
    todo = _on_device(point, session)
    if todo and not _done(files[session.target], point, todo):
        yield session.target, measured(replace(point, providers=todo), session)
    if "simulated" in point.providers:
        folder = f"simulated-{session.chip}"
        if not _done(files[folder], point, ("simulated",)):
            yield folder, simulated(point, session)


def _done(file: ResultFile, point: Point, providers: Sequence[str]) -> bool:
    wanted = (point.op, point.shape, str(point.tokens), point.indices if "select" in point.op else "")
    found = {row.provider for row in file.rows if (row.op, row.shape, row.tokens, row.indices) == wanted}
    return set(providers) <= found


# ---- measured ----


def measured(point: Point, session: Session) -> list[Row]:
    works = input_sets(point, session.device)
    blank = _blank(works[0], session)
    rows = [_bound(blank, works[0], session.target)] if "roofline" in point.providers else []
    calls: dict[str, list[Call]] = {}
    verdicts: dict[str, Row] = {}
    truth = functools.cache(lambda: gate(works[0]))  # not needed where nothing is to be judged
    for provider in (name for name in point.providers if name in CALLED):
        verdict, found = _admitted(provider, works, truth, replace(blank, provider=provider))
        verdicts[provider] = verdict
        if verdict.status == "ok":
            calls[provider] = found
    del truth
    times = timed(calls, session)
    for provider, verdict in verdicts.items():
        rows += _timed_rows(verdict, times[provider]) if provider in times else [verdict]
    return rows


def input_sets(point: Point, device: torch.device) -> list[Workload]:
    make = functools.partial(
        workload, point.op, shape_named(point.shape), point.tokens, batch=point.batch, device=device, dtype=DTYPE,
        indices=point.indices,
    )  # fmt: skip
    first = make(seed=0)
    size = sum(tensor.numel() * tensor.element_size() for tensor in first.inputs.values())
    sets = max(2, min(INPUT_SETS, MOST_INPUT_BYTES // max(1, size)))
    return [first, *(make(seed=seed) for seed in range(1, sets))]


def _admitted(provider: str, works: list[Workload], truth: Callable[[], Any], row: Row) -> tuple[Row, list[Call]]:
    """Whether this provider may be timed, and its call on each input set."""
    try:
        calls = [call_of(provider, work) for work in works]
        found = [call for call in calls if call is not None]
        if not found:
            return replace(row, status="missing: there is no such operator"), []
        result = found[0]()
        if provider not in SAME_RESULT:
            return row, found
        worst = truth().worst(result)
    except (NsaError, RuntimeError, MemoryError) as error:  # it does not hide what the others do
        return replace(row, status=f"failed: {_first_line(error)}"), []
    errors = {"rms_error": f"{worst.rms_error:.3e}", "rms_limit": f"{worst.limit:.3e}"}
    if worst.ok:
        return replace(row, **errors), found
    return replace(row, status=f"wrong: error {worst.rms_error:.1e}, allowed {worst.limit:.1e}", **errors), []


def _first_line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:160]}" if said else type(error).__name__


def timed(calls: dict[str, list[Call]], session: Session) -> dict[str, list[tuple[float, float]]]:
    """Microseconds with cold and warm caches, one pair per round. All providers take turns on the same inputs, so that
    a machine that is busy for a while slows them alike."""
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    most = MOST_ROUNDS.get(session.device.type, DEFAULT_ROUNDS)
    began = time.monotonic()
    for number in range(most):
        if number >= session.fewest_rounds and time.monotonic() - began > session.seconds:
            break
        for provider, sets in calls.items():
            times[provider].append(session.clock.cold_and_warm(sets[number % len(sets)]))
    return dict(times)


def _timed_rows(row: Row, times: list[tuple[float, float]]) -> list[Row]:
    found = []
    for cache, values in zip(("cold", "warm"), zip(*times, strict=True), strict=True):
        p20, p50, p80 = (f"{percentile(values, percent):.1f}" for percent in (20, 50, 80))
        found.append(replace(row, cache=cache, p20_us=p20, p50_us=p50, p80_us=p80, rounds=str(len(values))))
    return found


# ---- estimated ----


def simulated(point: Point, session: Session) -> list[Row]:
    """The simulator's estimate for a chip that is not here, and the bound of the same chip."""
    newest = compiler()
    work = workload(
        point.op, shape_named(point.shape), point.tokens, batch=point.batch, dtype=DTYPE, indices=point.indices,
        filled=False,
    )  # fmt: skip
    blank = replace(
        _blank(work, session),
        target=session.chip,
        device=f"{session.chip}, simulated",
        compiler=f"ascendnpu-ir {newest.version}",
    )
    row = replace(blank, provider="simulated")
    try:
        reports = simulated_times(functools.partial(work.call, "triton"), session.chip, newest, fills=work.fills)
        row = replace(row, simulated_us=f"{sum(report.us for report in reports):.1f}")
    except (NsaError, RuntimeError) as error:
        row = replace(row, status=f"failed: {_first_line(error)}")
    return [row, _bound(blank, work, session.chip)]


def _bound(blank: Row, work: Workload, target: str) -> Row:
    rates = rates_of(target)
    if rates is None:
        raise ArgumentValueError("--providers", f"no roofline: bench/rates.py knows no rates of {target}", "roofline")
    return replace(blank, provider="roofline", bound_us=f"{rates.least_us(work.flops, work.bytes):.1f}")


# ---- what is known of a case and of the machine ----


def _blank(work: Workload, session: Session) -> Row:
    live = "" if work.live_blocks is None else f"{work.live_blocks:.2f}"
    return Row(
        provider="", status="ok", op=work.op, shape=work.shape.name, dtype=str(work.dtype).removeprefix("torch."),
        batch=str(work.batch), tokens=str(work.tokens), indices=work.indices if work.live_blocks is not None else "",
        live_blocks=live, flops=str(work.flops), bytes=str(work.bytes),
        utc=datetime.now(timezone.utc).isoformat(timespec="seconds"), **session.machine,
    )  # fmt: skip


def _device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(getattr(torch, device.type).get_device_name(device.index or 0))
    file = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", file.read_text()) if file.exists() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """Of the repository that this file belongs to, with "-dirty" where something is changed; "" outside of one."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=here.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        if git("rev-parse", "--show-toplevel") != str(here.parent.parent):
            return ""
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or ""
    except FileNotFoundError:  # no git
        return ""
