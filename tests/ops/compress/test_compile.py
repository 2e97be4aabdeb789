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
from nsa_triton.ops.compress import launch

CHIPS = ("Ascend910B1", "Ascend910B4", "Ascend910_9392")
VERSIONS = ("1.2.0", "1.0.0")
WINDOWS = [(block, stride) for block in range(16, 129, 16) for stride in range(16, block + 1, 16)]


def jobs(chip_name, version, shapes):
    """One job per different kernel; `shapes` are (dtype, heads, head size, window, stride)."""
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
    """For every entry of the shipped file, the shape at the upper ends of its key: the largest tiles it makes."""
    content = json.loads((config_root() / "default" / "compress.json").read_text())
    for entry in content["entries"]:
        key = entry["key"]
        dtype = {2: torch.bfloat16, 4: torch.float32}[key.get("itemsize", 4)]
        if "block" in key:
            yield dtype, 128, 256, key["block"]["max"], 16
        elif key.get("overhang"):
            stride = min(key["stride"]["max"], 112)  # a window of 128 tokens is the longest
            yield dtype, 128, 256, stride + 16, stride
        elif "stride" in key:
            yield dtype, 128, 256, key["stride"]["max"], key["stride"]["max"]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS)
def test_every_shipped_config_compiles_without_problems(chip_name, version):
    if version not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    assert problems(jobs(chip_name, version, worst_shapes())) == {}


def test_kernels_use_the_vector_cores_only():
    """The launcher starts one program per vector core: a dot would need cube cores instead."""
    reports = compile_many(jobs("Ascend910B2", compilers()[0].version, [(torch.bfloat16, 4, 128, 32, 16)]))
    assert {report.mix_mode for report in reports} == {"aiv"}


def test_forward_copies_each_token_about_once():
    """Overlapping windows share one copy: per tile of BT tokens, BT + l - d rows come in, not BT * l / d."""
    (report,) = (
        report
        for report in compile_many(jobs("Ascend910B2", compilers()[0].version, [(torch.bfloat16, 4, 128, 32, 16)]))
        if report.kernel == "compress_fwd"
    )
    per_tile = report.constexprs["BR"] - report.constexprs["L"] + report.constexprs["S"]  # tokens a tile advances
    assert report.counts["dma"]["load"] == 2  # the tile, and the weights of a head
    assert report.constexprs["BR"] / per_tile < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_legal_window_compiles_without_problems(dtype, version):
    if version not in {compiler.version for compiler in compilers()}:
        pytest.skip(f"ascendnpu-ir {version} is not installed; `nsa-triton compile --compiler {version}` says how")
    shapes = [(dtype, 3, head_dim, *window) for window in WINDOWS for head_dim in (80, 256)]
    assert problems(jobs("Ascend910B4", version, shapes)) == {}
