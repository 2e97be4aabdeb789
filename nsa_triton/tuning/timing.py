"""How candidates are ranked: measured with the device's timer, or simulated where the chip is not here."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ascend.chips import CHIPS, chip
from nsa_triton.ascend.simulator.report import total_us
from nsa_triton.ascend.toolchain import compiler, compilers, distribution_version
from nsa_triton.errors import ArgumentValueError
from nsa_triton.runtime.clock import microseconds
from nsa_triton.runtime.executors import Executor
from nsa_triton.runtime.launch import INSTEAD, executor_for
from nsa_triton.runtime.simulation import simulated_times
from nsa_triton.runtime.target import Target, ascend_target, present_targets, target_of
from nsa_triton.workloads import Workload

ROUNDS = 15  # of measured calls, behind the first one, which compiles


@dataclass(frozen=True)
class Place:
    """Where candidates are ranked."""

    target: Target
    device: torch.device  # of the tensors
    simulated: bool

    @property
    def how(self) -> str:
        return "simulated" if self.simulated else "measured"

    @property
    def compiles(self) -> bool:
        """Whether the compiler of this target can be asked about candidates before they run."""
        return self.is_ascend and any(one.version == self.target.compiler for one in compilers())

    @property
    def is_ascend(self) -> bool:
        """Whether the sizes of its memories are known."""
        return self.target.kind == "npu" and self.target.name in CHIPS

    def versions(self) -> dict[str, Any]:
        """What the times depend on, besides the kernel."""
        found: dict[str, Any] = {"triton-ascend": distribution_version("triton-ascend")}
        if self.simulated:
            return {**found, "model": _model(self.target.name)}
        if self.target.kind == "cuda":
            driver = f"CUDA {torch.version.cuda}"
            return {"triton": distribution_version("triton"), "device": _gpu(self.device), "driver": driver}
        if self.target.kind == "npu":
            return {**found, "device": self.target.name, "driver": f"torch_npu {distribution_version('torch-npu')}"}
        versions = {name: distribution_version(name) for name in ("ascendnpu-ir", "llvmlite", "torch")}
        return {**found, **versions, "threads": torch.get_num_threads()}


def _model(chip_name: str) -> str:
    from nsa_triton.ascend.simulator.costs import Costs

    return str(Costs(chip(chip_name)).version)


def simulated_like(name: str) -> str:
    """The first chip whose figures are all those of this one: what is simulated for one of them holds for the other.
    Both compilers make the same programs for them."""
    from nsa_triton.ascend.simulator.costs import figures

    return next(other for other in CHIPS if figures(other) == figures(name))


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name


def present_chips() -> dict[str, torch.device]:
    """Names of the targets of this machine."""
    devices = [torch.device(kind) for kind in present_targets()]
    return {target_of(device).name: device for device in devices}


def place_named(name: str, version: str | None) -> Place:
    """The target of that name: of this machine, else an Ascend chip in its simulator."""
    present = present_chips()
    if name in present:
        return Place(target_of(present[name]), present[name], simulated=False)
    if name not in CHIPS:
        known = ", ".join((*present, *sorted(CHIPS)))
        raise ArgumentValueError("chip", f"one of {known}", repr(name))
    one = chip(name)
    target = ascend_target(one, compiler(version).version)
    return Place(target, torch.device("cpu"), simulated=True)


@dataclass(frozen=True)
class Time:
    us: float
    p20_us: float | None = None
    p80_us: float | None = None


def timed(work: Workload, place: Place, only: Collection[str], most_us: float = float("inf")) -> Time:
    """The sum over the launches of the kernels that `only` names, in one call. A simulation that comes to more than
    `most_us` ends with a TooSlowError."""
    if place.simulated:
        version = compiler(place.target.compiler)
        call = functools.partial(work.call, "triton")
        more = {"fills": work.fills, "only": only, "most_us": most_us}
        return Time(total_us(simulated_times(call, place.target.name, version, **more)))
    return _measured(work, place, only)


def _measured(work: Workload, place: Place, only: Collection[str]) -> Time:
    stopwatch = _Stopwatch(place, only)
    token = INSTEAD.set(stopwatch)
    try:
        us = [stopwatch.of(work) for _ in range(1 + ROUNDS)][1:]
    finally:
        INSTEAD.reset(token)
    p20, *_, p80 = statistics.quantiles(us, n=5)
    return Time(statistics.median(us), p20, p80)


class _Stopwatch:
    """Runs every launch, and adds up how long those of some kernels take."""

    def __init__(self, place: Place, only: Collection[str]) -> None:
        self.device, self.only, self.us = place.device, only, 0.0
        self.inner: Executor = executor_for(place.target.kind, place.device)

    def of(self, work: Workload) -> float:
        """Microseconds in one call."""
        self.us = 0.0
        work.call("triton")
        return self.us

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        launch = functools.partial(self.inner.launch, kernel, programs, arguments, constexprs, options)
        if kernel.fn.__name__ in self.only:
            self.us += microseconds(self.device, [launch])[0]
        else:
            launch()
