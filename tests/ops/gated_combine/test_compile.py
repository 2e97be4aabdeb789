"""Every shipped config compiles for the chips, with both Ascend compilers, and nothing speaks against it."""

from __future__ import annotations

import json

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers
from nsa_triton.runtime.configs import config_root
from tests.compiling import CHIPS, VERSIONS, no_ascend, problems, reports

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.gated_combine import launch

BF16, FP32 = torch.bfloat16, torch.float32
SHAPE = (BF16, 64, 128, FP32)


def worst_shapes():
    """For every entry of the shipped file, head sizes at the upper end of its key, with the largest tiles it makes, and
    one less, whose rows are padded."""
    content = json.loads((config_root() / "default" / "gated_combine.json").read_text())
    for entry in content["entries"]:
        most = entry["key"].get("value_dim", {}).get("max", 128)
        for value_dim in (most, most - 1):
            yield BF16, 3, value_dim, FP32
            yield FP32, 3, value_dim, FP32


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS)
def test_every_shipped_config_compiles_without_problems(chip_name, version):
    assert problems(launch, chip_name, version, worst_shapes()) == {}


def test_kernels_use_the_vector_cores_only():
    """The launcher starts one program per vector core: a dot would need cube cores instead."""
    modes = {report.mix_mode for report in reports(launch, "Ascend910B2", compilers()[0].version, [SHAPE])}
    assert modes == {"aiv"}


def test_every_tensor_is_moved_once():
    """One transfer for each branch, gate and gradient of a tile, and none by elements."""
    found = {report.kernel: report for report in reports(launch, "Ascend910B2", compilers()[0].version, [SHAPE])}
    moved = {name: {kind: report.counts["dma"][kind] for kind in ("load", "store")} for name, report in found.items()}
    assert moved == {"gated_combine_fwd": {"load": 6, "store": 1}, "gated_combine_bwd": {"load": 7, "store": 6}}
    assert not any(report.element_transfers for report in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_any_head_size_compiles_without_problems(dtype, version):
    shapes = [(dtype, 3, value_dim, dtype) for value_dim in (1, 2, 15, 33, 48, 65, 80, 96, 129, 192, 256, 520, 1024)]
    assert problems(launch, "Ascend910B4", version, shapes) == {}
