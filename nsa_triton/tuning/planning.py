"""What a call would launch, as values, and what it asks autotune_configs for. Nothing runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nsa_triton.runtime.configs import Config, KeyItems, listening, lookup, overriding
from nsa_triton.runtime.launch import INSTEAD, Launch
from nsa_triton.runtime.target import STAND_IN, Target
from nsa_triton.tuning.sweep import Candidate
from nsa_triton.tuning.timing import Place
from nsa_triton.workloads import Workload

Choices = Iterable[tuple[str, Candidate]]


@dataclass(frozen=True)
class Asked:
    """One look-up of a config: the key items as look-up sees them, and what was found."""

    family: str
    kernel: str
    key: KeyItems
    length: int
    tiles: tuple[str, ...]
    found: Config


class _Recorder:
    """An executor that keeps launches instead of running them."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        self.launches.append(Launch(kernel, programs, arguments, constexprs, options))


def planned(work: Workload, place: Place, choices: Choices) -> list[Launch]:
    """All launches of the call with these configs."""
    recorder = _Recorder()
    token = INSTEAD.set(recorder)
    stand_in = STAND_IN.set(place.target if place.simulated else None)
    try:
        with choosing(choices, place.target.kind):
            work.call("triton")
    finally:
        INSTEAD.reset(token)
        STAND_IN.reset(stand_in)
    return recorder.launches


@contextmanager
def choosing(choices: Choices, kind: str) -> Iterator[None]:
    """Look-ups inside find these configs."""
    with ExitStack() as stack:
        for kernel, candidate in choices:
            options = {kind: dict(candidate.options)} if candidate.options else {}
            stack.enter_context(overriding(kernel, dict(candidate.tiles), options))
        yield


def asked_for(work: Workload, place: Place, choices: Choices = ()) -> list[Asked]:
    """The look-ups of the call, each kernel's once, with what the files say. Those of chosen kernels are none."""
    found: dict[str, Asked] = {}

    def note(op: str, key: KeyItems, length: int, tiles: tuple[str, ...], config: Config) -> None:
        found.setdefault(config.kernel, Asked(op, config.kernel, key, length, tiles, config))

    with listening(note):
        planned(work, place, choices)
    return list(found.values())


def default_config(asked: Asked, target: Target) -> Config:
    """What default/ says, whatever is tuned."""
    plain = replace(target, name="default")
    return lookup(asked.family, asked.kernel, plain, dict(asked.key), asked.length, asked.tiles)


def name_of(launch: Launch) -> str:
    return str(launch.kernel.fn.__name__)


def fingerprint(launch: Launch) -> tuple[Any, ...]:
    """What makes two launches the same work: program, grid, numbers and shapes of tensors."""
    numbers = tuple(tuple(value.shape) if isinstance(value, Tensor) else value for value in launch.arguments.values())
    return launch.specialization().key(), launch.programs, numbers, tuple(sorted(launch.options.items()))
