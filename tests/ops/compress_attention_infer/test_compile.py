"""What `nsa-triton compile` compiles of this op compiles for the chips, and nothing speaks against it."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers, front_end_problem
from nsa_triton.ops.compress_attention_infer.cases import COMPILES
from nsa_triton.runtime.target import ascend_target

if front_end_problem() is not None or not compilers():
    pytest.skip(f"no Ascend toolchain: {front_end_problem() or 'no ascendnpu-ir'}", allow_module_level=True)

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ops.compress_attention_infer import launch

CHIPS = ("Ascend910B4", "Ascend910B1", "Ascend910_9392")
VERSIONS = ("1.2.0", "1.0.0")  # the first chip and version see every shape, all others the first shape


def jobs(chip_name, version, shapes):
    """One job per different kernel; `shapes` are arguments of compile_plans."""
    compiler = next(compiler for compiler in compilers() if compiler.version == version)
    one = chip(chip_name)
    target = ascend_target(one.name, one.vector_cores, one.cube_cores)
    found = {}
    for shape in shapes:
        for plan in launch.compile_plans(target, *shape):
            spec = plan.specialization()
            found[spec.key()] = Job(spec, one.name, compiler, plan.options)
    return list(found.values())


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS)
def test_declared_shapes_compile_without_problems(chip_name, version):
    if version not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    shapes = COMPILES if (chip_name, version) == (CHIPS[0], VERSIONS[0]) else COMPILES[:1]
    reports = compile_many(jobs(chip_name, version, shapes))
    assert {report.label: report.problems() for report in reports if report.problems()} == {}


def test_attention_uses_the_cube_and_the_choice_only_vector_cores():
    """The launcher starts one program per core of the kind that a kernel uses."""
    shape = (torch.bfloat16, 4, 64, 4, 192, 128, 32, 16, 64, 16, 128, 1, 4096)
    reports = compile_many(jobs("Ascend910B2", compilers()[0].version, [shape]))
    modes = {report.kernel: report.mix_mode for report in reports}
    assert modes == {"compress_attention_split": "mix", "compress_attention_choose": "aiv"}


@pytest.mark.slow
def test_declared_shapes_compile_with_the_older_compiler():
    if VERSIONS[1] not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {VERSIONS[1]} is not installed")
    reports = compile_many(jobs(CHIPS[0], VERSIONS[1], COMPILES))
    assert {report.label: report.problems() for report in reports if report.problems()} == {}
