"""Launches that run once more where each of their tensors ends, or begins, at a page that faults when touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target
from tests.guard import run_guarded

Side = Literal["after", "before"]
_run = Launch.run  # as it is before a test replaces it


def tensors_of(planned: Launch) -> dict[str, Tensor]:
    return {name: value for name, value in planned.arguments.items() if isinstance(value, Tensor)}


def run_at_the_edge(planned: Launch, target: Target, device: torch.device, side: Side) -> dict[str, Tensor]:
    """The tensors of a launch after it ran in a guarded child, which must have nothing left to compile."""

    def run(**tensors: Tensor) -> None:
        arguments = {name: tensors.get(name, value) for name, value in planned.arguments.items()}
        _run(Launch(planned.kernel, planned.programs, arguments, planned.constexprs), target, device)

    return run_guarded(run, tensors_of(planned), side)


def assert_the_same_at_the_edge(planned: Launch, target: Target, device: torch.device, side: Side) -> None:
    """For a launch that has run: the guarded one leaves the same bits in all of its tensors."""
    after = run_at_the_edge(planned, target, device, side)
    for name, tensor in tensors_of(planned).items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def assert_guarded(
    launches: Sequence[Launch], target: Target, side: Side, harmless: Sequence[Launch] | None = None
) -> None:
    """Run the launches of a call on CPU tensors, and each once more at the edge.

    `harmless` are launches of the same shapes: what this process runs, to compile, where `launches` might do damage.
    """
    cpu = torch.device("cpu")
    for planned, compiled in zip(launches, harmless or launches, strict=True):
        compiled.run(target, cpu)  # outside of the guarded child; it fills what the next launch reads
        if harmless is None:
            assert_the_same_at_the_edge(planned, target, cpu, side)
        else:
            run_at_the_edge(planned, target, cpu, side)
