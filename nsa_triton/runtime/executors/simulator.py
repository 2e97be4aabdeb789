"""Runs kernels in the simulator of an Ascend chip: the final on-chip program, instruction by instruction."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import final_module
from nsa_triton.ascend.lower import Specialization, signature_of
from nsa_triton.ascend.simulator.checks import Checker
from nsa_triton.ascend.simulator.clock import Timing
from nsa_triton.ascend.simulator.costs import Costs
from nsa_triton.ascend.simulator.machine import run, time
from nsa_triton.ascend.simulator.report import LaunchReport, launch_report, total_us
from nsa_triton.ascend.simulator.translate import Program, translate
from nsa_triton.ascend.toolchain import Compiler
from nsa_triton.ascend.toolchain import compiler as installed_compiler
from nsa_triton.runtime.executors.host import HostExecutor


class SimulatorExecutor:
    """Compiles each kernel once, and either computes or times every launch.

    With a checker, what is computed is watched. With `times`, nothing is computed: tensors keep what they hold, and
    `reports` gets one entry per launch. Kernels that `fills` names run on this CPU too, the quick way, before they are
    timed: those whose results, such as lists of blocks, control others. Where `only` names kernels, the others are not
    timed, nor even compiled. A TooSlowError as soon as all of them together take more than `most_us`.
    """

    def __init__(
        self,
        chip_name: str,
        compiler: Compiler | None = None,
        *,
        checker: Checker | None = None,
        times: bool = False,
        fills: Collection[str] = (),
        only: Collection[str] | None = None,
        sampled: bool = True,
        warm: bool = False,
        keeps_events: bool = False,
        most_us: float = float("inf"),
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.chip, self.compiler, self.checker = chip(chip_name), compiler or installed_compiler(), checker
        self.times, self.fills, self.sampled, self.warm, self.keeps_events = times, fills, sampled, warm, keeps_events
        self.options, self.only, self.most_us = options, only, most_us
        self.reports: list[LaunchReport] = []
        self._programs: dict[tuple[str, str], Program] = {}

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        if self.times and kernel.fn.__name__ in self.fills:
            HostExecutor().launch(kernel, programs, arguments, constexprs, {})
        if self.times and self.only is not None and kernel.fn.__name__ not in self.only:
            return
        program = self.program(kernel, arguments, constexprs, {**options, **self.options})
        if not self.times:
            run(program, self.chip, programs, dict(arguments), self.checker)
            return
        most_us = self.most_us - total_us(self.reports)
        timing = Timing(self.chip, Costs(self.chip), self.sampled, self.warm, self.keeps_events, most_us)
        time(program, self.chip, programs, dict(arguments), timing)
        self.reports.append(launch_report(timing, kernel.fn.__name__, self.compiler.version, programs))

    def program(
        self,
        kernel: Any,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> Program:
        spec = Specialization(kernel, signature_of(arguments), dict(constexprs))
        key = (spec.key(), repr(sorted(options.items())))
        found = self._programs.get(key)
        if found is None:
            text = final_module(spec, self.chip.name, compiler=self.compiler, options=options, optimized=True)
            found = self._programs[key] = translate(text)
        return found
