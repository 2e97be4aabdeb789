"""Both implementations of an op as a parameter of its tests; kernels are skipped where they cannot run, with why."""

from __future__ import annotations

import importlib

import pytest

from nsa_triton.ascend.toolchain import front_end_problem


def kernel_problem(op: str) -> str:
    """What keeps the kernels of an op from running on CPU tensors here; empty if nothing does."""
    problem = front_end_problem()
    if problem is not None:
        return str(problem)
    try:
        importlib.import_module(f"nsa_triton.ops.{op}.launch")
    except ImportError as error:
        return f"the launcher cannot be imported: {error}"
    return ""


def each_implementation(op: str) -> pytest.MarkDecorator:
    """Runs a test with impl="reference" and with impl="triton"."""
    problem = kernel_problem(op)
    kernels = pytest.param("triton", marks=pytest.mark.skipif(bool(problem), reason=problem))
    return pytest.mark.parametrize("impl", ["reference", kernels])
