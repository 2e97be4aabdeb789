"""What the compile tests of all ops share: chips, compilers, and the jobs of a list of shapes."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import pytest

from nsa_triton.ascend.lower import signature_of
from nsa_triton.ascend.toolchain import compilers, front_end_problem, triton_problem
from nsa_triton.runtime.launch import Launch
from nsa_triton.runtime.target import Target, ascend_target

CHIPS = ("Ascend910B1", "Ascend910B4", "Ascend910_9392")
VERSIONS = ("1.2.0", "1.0.0")
GPU = Target("cuda", "nvidia-h200", 132, 132)


def no_ascend() -> str:
    """Why nothing can be compiled for Ascend chips here; "" if it can."""
    problem = front_end_problem()
    return f"no Ascend toolchain: {problem or 'no ascendnpu-ir'}" if problem is not None or not compilers() else ""


def no_upstream() -> str:
    return "" if triton_problem("triton") is None else "upstream Triton is not what owns triton/ here"


def reports(launch: ModuleType, chip_name: str, version: str, shapes: Any) -> list[Any]:
    """One report per different kernel; a shape is what `launch.compile_plans` takes."""
    from nsa_triton.ascend.chips import chip
    from nsa_triton.ascend.compile import Job, compile_many

    if version not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    compiler = next(compiler for compiler in compilers() if compiler.version == version)
    one = chip(chip_name)
    target = ascend_target(one, version)
    found = {}
    for shape in shapes:
        for plan in launch.compile_plans(target, *shape):
            spec = plan.specialization()
            found[spec.key()] = Job(spec, one.name, compiler, plan.options, plan.ub_limit)
    return list(compile_many(list(found.values())))


def problems(launch: ModuleType, chip_name: str, version: str, shapes: Any) -> dict[str, list[str]]:
    """What speaks against each kernel; nothing, if all is well."""
    return {r.label: r.problems() for r in reports(launch, chip_name, version, shapes) if r.problems()}


def compile_for_hopper(planned: Launch) -> str:
    """The PTX that upstream Triton makes of a launch; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constexprs = signature_of(planned.arguments), dict(planned.constexprs)
    if "constants" in inspect.signature(ASTSource).parameters:  # Triton 3.2
        source = ASTSource(planned.kernel, signature=signature, constants=constexprs)
    else:
        source = ASTSource(planned.kernel, {**signature, **dict.fromkeys(constexprs, "constexpr")}, constexprs)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(planned.options))
    text: str = compiled.asm["ptx"]
    return text
