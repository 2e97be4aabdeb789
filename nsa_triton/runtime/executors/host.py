"""Runs kernels on the CPU, through the Ascend lowering."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nsa_triton.ascend.lower import Specialization
from nsa_triton.ascend.native import NativeKernel, native_kernel
from nsa_triton.errors import ArgumentTypeError, ArgumentValueError

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class HostExecutor:
    """The executor of the cpu target: programs run on the calling thread and on worker threads."""

    def __init__(self) -> None:
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
        signature = {name: _type(name, value) for name, value in arguments.items()}
        # Types are part of the key: 1, 1.0 and True are equal, but not the same constexpr.
        values = tuple((name, type(value), value) for name, value in constexprs.items())
        key = (kernel, tuple(signature.items()), values)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = native_kernel(Specialization(kernel, signature, constexprs))
        return found


def _type(name: str, value: object) -> str:
    """The Triton type of a run-time argument."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ArgumentValueError(name, "a tensor in CPU memory", f"one on {value.device}")
        if value.dtype not in POINTERS:
            raise ArgumentTypeError(name, f"a dtype among {', '.join(str(d) for d in POINTERS)}", value.dtype)
        return POINTERS[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return "i32"
        if -(2**63) <= value < 2**63:
            return "i64"
        raise ArgumentValueError(name, "an integer of at most 64 bits", value)
    raise ArgumentTypeError(name, "a tensor, an int or a float", type(value).__name__)
