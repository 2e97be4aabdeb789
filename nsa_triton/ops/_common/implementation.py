"""Which implementation runs: the one place that decides what impl="auto" means.

"triton" runs the kernels or raises, "reference" runs the PyTorch specification, and "auto" runs the kernels and takes
the reference only where they cannot run: for float64, or on a machine without the tools. It says so in the log.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch

from nsa_triton.errors import ArgumentTypeError, ArgumentValueError, ToolchainError

IMPLEMENTATIONS = ("auto", "triton", "reference")

Result = TypeVar("Result")
_log = logging.getLogger("nsa_triton")


def check_impl(impl: Any) -> None:
    if not isinstance(impl, str):
        raise ArgumentTypeError("impl", f"one of {', '.join(IMPLEMENTATIONS)}", type(impl).__name__)
    if impl not in IMPLEMENTATIONS:
        raise ArgumentValueError("impl", f"one of {', '.join(IMPLEMENTATIONS)}", repr(impl))


def run(
    impl: str,
    dtype: torch.dtype,
    kernels: Callable[[], Any],
    reference: Callable[[], Result],
    argument: str = "input",
) -> Result:
    """Call `kernels` or `reference`, as `impl` asks. `argument` is what has the dtype."""
    check_impl(impl)
    if impl == "reference":
        return reference()
    if dtype is torch.float64:
        if impl == "triton":
            expected = "float16, bfloat16 or float32"
            raise ArgumentTypeError(f"{argument}.dtype", expected, dtype, "Only impl='reference' computes in float64")
        _say_once("no kernel computes in float64")
        return reference()
    try:
        result: Result = kernels()
        return result
    except ToolchainError as problem:
        if impl == "triton":
            raise
        _say_once(str(problem))
    return reference()


@functools.cache
def _say_once(reason: str) -> None:
    _log.warning("impl='auto' runs the slow reference implementation: %s", reason)


def launcher(op: str) -> ModuleType:
    """The module that launches the kernels of an operator family. This is where Triton is first imported."""
    try:
        return importlib.import_module(f"nsa_triton.ops.{op}.launch")
    except ImportError as error:
        if (error.name or "").startswith("nsa_triton"):
            raise  # a mistake of ours, not of the installation
        raise ToolchainError(
            f"Triton cannot be imported ({error})",
            ("pip install 'nsa_triton[npu]'    # Ascend NPUs; [cuda] or [cpu] for those", "nsa-triton env"),
        ) from error
