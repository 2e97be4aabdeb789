"""Every shipped config compiles for the chips, with both Ascend compilers, and nothing speaks against it."""

from __future__ import annotations

import pytest

from nsa_triton.ascend.toolchain import compilers, front_end_problem
from nsa_triton.runtime.target import ascend_target

if front_end_problem() is not None or not compilers():
    pytest.skip(f"no Ascend toolchain: {front_end_problem() or 'no ascendnpu-ir'}", allow_module_level=True)

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ops.select_attention_infer import launch
from nsa_triton.ops.select_attention_infer.cases import COMPILES

CHIPS = ("Ascend910B1", "Ascend910B4", "Ascend910_9392")
VERSIONS = ("1.2.0", "1.0.0")


def jobs(chip_name, version, shapes):
    """One job per different kernel."""
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
def test_every_case_compiles_without_problems(chip_name, version):
    if version not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    reports = compile_many(jobs(chip_name, version, COMPILES))
    assert {report.label: report.problems() for report in reports if report.problems()} == {}


def test_products_are_made_on_the_cube_and_the_splits_joined_on_the_vector_cores():
    reports = compile_many(jobs("Ascend910B2", compilers()[0].version, COMPILES[:1]))
    modes = {report.kernel: report.mix_mode for report in reports}
    assert modes["select_attention_split"] == "mix"
    assert modes["select_attention_join"] == "aiv"
