"""What keeps a fast candidate from being kept: wrong numbers, or a loss at lengths that its entry would serve too.

Times are compared among candidates that may be wrong; nothing is kept that did not pass here.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.toolchain import compiler
from nsa_triton.errors import CompileError, NsaError, ToolchainError
from nsa_triton.ops._common.accuracy import judge
from nsa_triton.ops._common.cases import CheckCase
from nsa_triton.ops.catalog import families
from nsa_triton.runtime.executors.simulator import SimulatorExecutor
from nsa_triton.runtime.simulation import simulating
from nsa_triton.runtime.target import KIND_OF_DEVICE
from nsa_triton.tuning.evaluation import evaluate, shape_to_time, workload_of
from nsa_triton.tuning.planning import asked_for, choosing
from nsa_triton.tuning.plans import default_of
from nsa_triton.tuning.sweep import Candidate, Sweep, Verdict
from nsa_triton.tuning.timing import place_named

LONGER = 4  # times the length that was tuned


def slower_when_longer(sweep: Sweep, candidate: Candidate) -> str:
    """ "" unless the default is faster where sequences are much longer: the entry will serve these too. The CPU target,
    which is for numbers, not for speed, is not asked."""
    place, tokens = workload_of(sweep)[1], LONGER * sweep.tokens
    if place.target.kind == "cpu":
        return ""
    longer = replace(sweep, tokens=tokens, shape=shape_to_time(sweep.op, sweep.shape, tokens, place))
    if sweep.kernel not in (asked.kernel for asked in asked_for(*workload_of(longer)[:2])):
        return ""  # sum_parts: so long a sequence keeps all cores busy without being cut into parts
    ours, default = evaluate(longer, candidate), _of_default(longer)
    if ours.us is None:
        return f"{ours.verdict} at {longer.tokens} tokens: {ours.why}"
    if default.us is not None and default.us < ours.us:
        return f"takes {ours.us / default.us:.2f} times as long as the default at {longer.tokens} tokens"
    return ""


@functools.lru_cache(maxsize=1)
def _of_default(sweep: Sweep) -> Verdict:
    """The same for all candidates."""
    return evaluate(sweep, default_of(sweep))


def what_is_wrong(sweep: Sweep, candidate: Candidate) -> str:
    """ "" if the op passes its check cases with the candidate's tiles, else what failed first.

    They run on the device, or on this CPU. For a chip that is not here they run in its simulator too, watched for
    races, as far as they fit there: their shapes are not the one that is tuned.
    """
    place = place_named(sweep.chip, sweep.compiler)
    chosen = [(sweep.kernel, candidate)]
    try:
        with choosing(chosen, KIND_OF_DEVICE[place.device.type]):
            wrong = next(_failures(sweep.op, place.device), "")
        if wrong or not place.simulated:
            return wrong
        with choosing(chosen, place.target.kind):
            return next(_failures_on_chip(sweep), "")
    except ToolchainError:
        raise
    except (NsaError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def _failures(op: str, device: torch.device) -> Iterator[str]:
    for judged in _judged_cases(op, device):
        yield from judged.failures(judged.case.run())


def _failures_on_chip(sweep: Sweep) -> Iterator[str]:
    checker = Checker()
    executor = SimulatorExecutor(sweep.chip, compiler(sweep.compiler), checker=checker)
    itemsize = workload_of(sweep)[0].dtype.itemsize  # entries are for numbers of this size
    for judged in _judged_cases(sweep.op, torch.device("cpu")):
        if judged.case.dtype.itemsize != itemsize:
            continue
        try:
            with simulating(executor):
                outputs = judged.case.run()
        except CompileError:
            continue  # it does not fit, with tiles that are meant for another shape
        where = f"in the simulator of {sweep.chip}"
        yield from (f"{failure} {where}" for failure in judged.failures(outputs))
        yield from (f"{fault} in {judged.case.op} {judged.case.shape} {where}" for fault in checker.faults)


@dataclass(frozen=True)
class _Judged:
    """A case, what eager PyTorch makes of it, and the truth."""

    case: CheckCase
    eager: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]

    def failures(self, outputs: tuple[Tensor, ...]) -> Iterator[str]:
        case = self.case
        for name, terms, ours, theirs, truth in zip(
            case.outputs, case.terms, outputs, self.eager, self.expected, strict=True
        ):
            accuracy = judge(ours, theirs, truth, terms=terms)
            if not accuracy.ok:
                found = f"RMS error {accuracy.rms_error:.1e} where {accuracy.limit:.1e} is allowed"
                yield f"{name} of {case.op} {case.shape}: {found}"


@functools.lru_cache(maxsize=4)
def _judged_cases(op: str, device: torch.device) -> tuple[_Judged, ...]:
    """The check cases of an op; what they expect is the same for all candidates."""
    (family,) = families([op])
    return tuple(
        _Judged(case, case.reference(lambda tensor: tensor), case.reference(lambda tensor: tensor.double()))
        for case in family.check_cases(device)
        if case.op == op
    )
