"""Every shipped config compiles for the chips, with both Ascend compilers, and nothing speaks against it."""

from __future__ import annotations

import json

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers, front_end_problem
from nsa_triton.runtime.configs import config_root
from nsa_triton.runtime.target import ascend_target

if front_end_problem() is not None or not compilers():
    pytest.skip(f"no Ascend toolchain: {front_end_problem() or 'no ascendnpu-ir'}", allow_module_level=True)

from nsa_triton.ascend.chips import chip
from nsa_triton.ascend.compile import Job, compile_many
from nsa_triton.ops.compress_infer import launch

CHIPS = ("Ascend910B1", "Ascend910B4", "Ascend910_9392")
VERSIONS = ("1.2.0", "1.0.0")


def jobs(chip_name, version, shapes):
    """One job per different kernel; `shapes` are (dtype, heads, head size, window, stride, page)."""
    compiler = next(compiler for compiler in compilers() if compiler.version == version)
    one = chip(chip_name)
    target = ascend_target(one.name, one.vector_cores, one.cube_cores)
    found = {}
    for shape in shapes:
        for plan in launch.compile_plans(target, *shape):
            spec = plan.specialization()
            found[spec.key()] = Job(spec, one.name, compiler, plan.options)
    return list(found.values())


def problems(all_jobs):
    return {report.label: report.problems() for report in compile_many(all_jobs) if report.problems()}


def worst_shapes():
    """For every entry of the shipped file, the largest pieces it makes, in the longest window."""
    content = json.loads((config_root() / "default" / "compress_infer.json").read_text())
    for entry in content["entries"]:
        piece, size = entry["key"]["piece"]["max"], entry["tiles"]["BD"]
        for dtype in (torch.bfloat16, torch.float32):
            yield dtype, 64, size, 128, piece, 128
    yield torch.bfloat16, 64, size, piece, piece, None


def small_shapes():
    """Head sizes that fill no tile, and pages that are no power of two."""
    yield torch.bfloat16, 1, 33, 48, 32, 48
    yield torch.float16, 65, 1, 16, 16, 16
    yield torch.bfloat16, 2, 192, 32, 16, 64


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS)
def test_every_shipped_config_compiles_without_problems(chip_name, version):
    if version not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    shapes = [*worst_shapes(), *small_shapes()]
    assert problems(jobs(chip_name, version, shapes)) == {}


def test_the_kernel_uses_the_vector_cores_only():
    """The launcher starts one program per vector core: a dot would need cube cores instead."""
    (report,) = compile_many(jobs("Ascend910B2", compilers()[0].version, [(torch.bfloat16, 4, 128, 32, 16, 64)]))
    assert report.mix_mode == "aiv"


def test_a_piece_is_one_page_id_and_two_copies():
    """Tokens and weights come in by one copy each; lengths, page ids and slots are the only scalar loads."""
    (report,) = compile_many(jobs("Ascend910B2", compilers()[0].version, [(torch.bfloat16, 4, 128, 32, 16, 64)]))
    assert report.counts["dma"]["load"] == 2
    assert report.counts["dma"]["store"] == 1
    assert {access.kind for access in report.scalar_accesses} == {"gm"}
    assert len(report.scalar_accesses) == 3
