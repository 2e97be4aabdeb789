"""Runs kernels on the CPU, through the Ascend lowering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ascend.lower import Specialization, signature_of
from nsa_triton.ascend.native import NativeKernel, native_kernel
from nsa_triton.ascend.toolchain import host_problem, require
from nsa_triton.errors import ArgumentValueError


class HostExecutor:
    """The executor of the cpu target: programs run on the calling thread and on worker threads."""

    def __init__(self) -> None:
        require(host_problem())
        self._kernels: dict[Any, NativeKernel] = {}

    def launch(
        self,
        kernel: Any,
        programs: int,
        arguments: Mapping[str, Tensor | int | float],
        constexprs: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> None:
        """Run `programs` programs of `kernel`; `options` matter to NPUs only."""
        self.compiled(kernel, arguments, constexprs).run(programs, list(arguments.values()), torch.get_num_threads())

    def compiled(
        self, kernel: Any, arguments: Mapping[str, Tensor | int | float], constexprs: Mapping[str, Any]
    ) -> NativeKernel:
        """The machine code that a launch with these arguments runs."""
        signature = signature_of(arguments)
        _check(arguments)
        # Types are part of the key: 1, 1.0 and True are equal, but not the same constexpr.
        values = tuple((name, type(value), value) for name, value in constexprs.items())
        key = (kernel, tuple(signature.items()), values)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = native_kernel(Specialization(kernel, signature, constexprs))
        return found


def _check(arguments: Mapping[str, Tensor | int | float]) -> None:
    """What the types do not tell: machine code believes every address and every number."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                raise ArgumentValueError(name, "a tensor in CPU memory", f"one on {value.device}")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ArgumentValueError(name, "an integer of at most 64 bits", value)
