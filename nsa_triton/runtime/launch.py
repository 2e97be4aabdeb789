"""A kernel launch as a value: the same one is executed on a device, run on the CPU, or only compiled for a chip."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_triton.ascend.chips import UB_LIMIT
from nsa_triton.runtime.executors import Executor
from nsa_triton.runtime.target import Target

if TYPE_CHECKING:
    from nsa_triton.ascend.lower import Specialization


# The simulator's executor while kernels run there; see simulation.py.
INSTEAD: ContextVar[Executor | None] = ContextVar("INSTEAD", default=None)


@dataclass(frozen=True)
class Launch:
    kernel: Any  # a triton JITFunction
    programs: int
    arguments: Mapping[str, Tensor | int | float]  # in the order of the kernel's parameters
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)  # of the kind of target that it was planned for
    ub_limit: int = UB_LIMIT  # percent of the unified buffer that its config allows

    def run(self, target: Target, device: torch.device) -> None:
        executor = INSTEAD.get() or executor_for(target.kind, device)
        executor.launch(self.kernel, self.programs, self.arguments, self.constexprs, self.options)

    def specialization(self) -> Specialization:
        """What the Ascend compiler needs to know of it; tensors may be meta tensors."""
        from nsa_triton.ascend.lower import Specialization, signature_of

        return Specialization(self.kernel, signature_of(self.arguments), dict(self.constexprs))


@functools.cache
def executor_for(kind: str, device: torch.device) -> Executor:
    """Raises a ToolchainError where this machine cannot run kernels on such a device."""
    if kind == "cpu":
        from nsa_triton.runtime.executors.host import HostExecutor

        return HostExecutor()
    from nsa_triton.runtime.executors.device import DeviceExecutor

    return DeviceExecutor(kind, device)
