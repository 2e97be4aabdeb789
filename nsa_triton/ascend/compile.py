"""Compile a kernel for an Ascend chip, on any machine, and report whether it fits and what it became."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nsa_triton.ascend.bishengir import DEFAULTS, Outcome, bishengir_compile, compile_flags, generic_form
from nsa_triton.ascend.chips import UB_LIMIT
from nsa_triton.ascend.chips import chip as chip_named
from nsa_triton.ascend.hivm_facts import Place, module_facts
from nsa_triton.ascend.hivm_module import MEMORIES, location_in
from nsa_triton.ascend.lower import ARCH, Lowered, Specialization, lower
from nsa_triton.ascend.report import CompileReport, Overflow
from nsa_triton.ascend.toolchain import Compiler
from nsa_triton.ascend.toolchain import compiler as installed_compiler
from nsa_triton.errors import CompileError

_OVERFLOW = re.compile(r"(\w+) overflow, requires (\d+) bits while (\d+) bits available")
_SCALAR_WARNING = re.compile(r"(.*)warning: Op '([\w.]+)' will execute by scalar instruction")
_UNSPECIFIC_ERRORS = ("Failed to run BiShengHIR pipeline", "External hivmc run fails")


@dataclass(frozen=True)
class Job:
    """One compile: a kernel made concrete, the chip, the compiler (None: the newest one found), and launch options."""

    spec: Specialization
    chip: str = ARCH
    compiler: Compiler | None = None
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    ub_limit: int = UB_LIMIT  # percent that counts as full

    def chosen(self) -> Compiler:
        return self.compiler or installed_compiler()

    def flags(self) -> list[str]:
        """The flags for bishengir-compile; an ArgumentError for an unknown chip or option."""
        return compile_flags(chip_named(self.chip).name, self.chosen(), self.options)


def compile_kernel(
    spec: Specialization,
    chip: str = ARCH,
    *,
    compiler: Compiler | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    keep: Path | None = None,
) -> CompileReport:
    """Compile `spec` for `chip` and report whether it fits, what it uses, and what it became.

    A kernel that does not fit, or that the compiler refuses, is a report with `ok` False. Raised are only an
    ArgumentError (unknown chip or option), a CompileError (refused by the front end, or the compiler does not end) and
    a ToolchainError. `keep` names a folder: the lowered kernel, the final module and the compiler's log are saved in a
    folder of their own below it.
    """
    return _compile(Job(spec, chip, compiler, options), _lower, keep)


def compile_many(
    jobs: Sequence[Job],
    workers: int | None = None,
    progress: Callable[[CompileReport], None] | None = None,
    keep: Path | None = None,
) -> list[CompileReport]:
    """Compile all jobs in parallel. Reports come in the order of the jobs; `progress` gets each as soon as it is done.

    Unlike in `compile_kernel`, a kernel that the front end refuses or that hangs the compiler is a report too, so that
    one bad config does not hide the verdict on the others. A kernel that several jobs share is lowered once.
    """
    lowered: dict[str, Lowered] = {}

    def lower_once(spec: Specialization) -> Lowered:
        key = spec.key()
        if key not in lowered:
            lowered[key] = _lower(spec)
        return lowered[key]

    for job in jobs:
        job.flags()  # a bad chip or option is the caller's mistake: say so before any work
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        futures = [pool.submit(_compile_or_say_why, job, lower_once, keep) for job in jobs]
        try:
            for future in as_completed(futures):
                report = future.result()
                if progress is not None:
                    progress(report)
        finally:
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def final_module(
    spec: Specialization,
    chip: str = ARCH,
    *,
    compiler: Compiler | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    optimized: bool = False,
) -> str:
    """The program that runs on the chip: the last module with structured `hivm.hir` ops, affine ops lowered, in MLIR's
    generic form with source locations; with `optimized`, its scalar code as the back end leaves it. A CompileError
    where the kernel does not fit or is refused."""
    job = Job(spec, chip, compiler, options)
    flags = job.flags()
    outcome = bishengir_compile(_lower(spec).text, job.chosen(), flags)
    if not outcome.module:
        raise CompileError(f"{spec.name}: {_overflow(outcome.log) or _first_error(outcome)}", outcome.log)
    return generic_form(outcome.module, job.chosen(), optimized=optimized)


def _lower(spec: Specialization) -> Lowered:
    return lower(spec, line_info=True)


def _compile(job: Job, lowering: Callable[[Specialization], Lowered], keep: Path | None) -> CompileReport:
    flags = job.flags()
    lowered = lowering(job.spec)
    outcome = bishengir_compile(lowered.text, job.chosen(), flags)
    generic = generic_form(outcome.module, job.chosen()) if outcome.module else ""
    report = _report(job, lowered, outcome, generic)
    return report if keep is None else _kept(keep, job, report, lowered, outcome, generic)


def _compile_or_say_why(job: Job, lowering: Callable[[Specialization], Lowered], keep: Path | None) -> CompileReport:
    try:
        return _compile(job, lowering, keep)
    except CompileError as error:
        return dataclasses.replace(_blank(job), error=str(error))


def _blank(job: Job) -> CompileReport:
    return CompileReport(
        kernel=job.spec.name,
        signature=dict(job.spec.signature),
        constexprs=dict(job.spec.constexprs),
        chip=job.chip,
        compiler=job.chosen().version,
        options=dict(job.options),
        ub_limit=job.ub_limit,
    )


def _report(job: Job, lowered: Lowered, outcome: Outcome, generic: str) -> CompileReport:
    overflow = None if generic else _overflow(outcome.log)
    notes = _notes(outcome.log)
    wants_two_buffers = bool({**DEFAULTS, **job.options}["multibuffer"])
    return dataclasses.replace(
        _blank(job),
        mix_mode=lowered.mix_mode,
        seconds=outcome.seconds,
        fits=bool(generic),
        overflow=overflow,
        error=_first_error(outcome) if overflow is None and (outcome.failed or not generic) else "",
        notes=notes,
        scalar_warnings=_scalar_warnings(outcome.log),
        double_buffer_dropped=bool(generic) and wants_two_buffers and _says_dropped(notes),
        object_file="" if outcome.object_code is None else "kernel.o",
        program=hashlib.sha256(generic.encode()).hexdigest()[:12] if generic else "",
        **vars(module_facts(generic)),
    )


def _overflow(log: str) -> Overflow | None:
    """The last one: each retry of the compiler with other settings prints its own."""
    found = _OVERFLOW.findall(log)
    if not found:
        return None
    memory, required, available = found[-1]
    return Overflow(MEMORIES.get(memory.lower(), memory), int(required) // 8, int(available) // 8)


def _first_error(outcome: Outcome) -> str:
    for line in outcome.log.splitlines():
        if "error:" in line and not any(text in line for text in _UNSPECIFIC_ERRORS):
            place, message = location_in(line), line.rpartition("error: ")[2].strip()
            return f"{message} ({place})" if place else message
    if outcome.signal:
        return f"bishengir-compile crashed with signal {outcome.signal}"
    if outcome.module:
        return "hivmc, the last step of the compiler, made no object file"
    said = [line.strip() for line in outcome.log.splitlines() if line.strip()]
    return said[-1] if said else "bishengir-compile failed and said nothing"


def _notes(log: str) -> tuple[str, ...]:
    notes = (line.partition("[NOTE]")[2].strip() for line in log.splitlines() if "[NOTE]" in line)
    return tuple(dict.fromkeys(notes))


def _says_dropped(notes: Sequence[str]) -> bool:
    """1.2.0 says so in a note. 1.0.0 never drops double buffers: a kernel that does not fit with them is refused."""
    return any("enable-auto-multi-buffer to false" in note for note in notes)


def _scalar_warnings(log: str) -> tuple[Place, ...]:
    """Only 1.0.0 prints these; 1.2.0 falls back in silence, and only the module shows it."""
    return tuple(dict.fromkeys(Place(op, location_in(place)) for place, op in _SCALAR_WARNING.findall(log)))


def _kept(
    keep: Path, job: Job, report: CompileReport, lowered: Lowered, outcome: Outcome, generic: str
) -> CompileReport:
    """Save what came of the compile below `keep`, in a folder that names kernel, constexprs, chip and compiler."""
    constexprs = "-".join(f"{name}{value}" for name, value in job.spec.constexprs.items())
    others = hashlib.sha256(repr((job.spec.key(), sorted(job.options.items()))).encode()).hexdigest()[:8]
    name = "-".join(part for part in (report.kernel, constexprs, job.chip, report.compiler, others) if part)
    folder = keep / re.sub(r"[^\w.=-]+", "_", name)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"kernel.linalg.mlir": lowered.text, "kernel.hivm.mlir": generic, "compiler.log": outcome.log}
    for file, text in texts.items():
        (folder / file).write_text(text)
    if outcome.object_code is None:
        return report
    (folder / "kernel.o").write_bytes(outcome.object_code)
    return dataclasses.replace(report, object_file=str(folder / "kernel.o"))
