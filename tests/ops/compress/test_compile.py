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

from nsa_triton.ops.compress import launch

WINDOWS = [(block, stride) for block in range(16, 129, 16) for stride in range(16, block + 1, 16)]
SHAPE = (torch.bfloat16, 4, 128, 32, 16)


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
    assert problems(launch, chip_name, version, worst_shapes()) == {}


def test_kernels_use_the_vector_cores_only():
    """The launcher starts one program per vector core: a dot would need cube cores instead."""
    modes = {r.mix_mode for r in reports(launch, "Ascend910B2", compilers()[0].version, [SHAPE])}
    assert modes == {"aiv"}


def test_forward_copies_each_token_about_once():
    """Overlapping windows share one copy: per tile of BT tokens, BT + l - d rows come in, not BT * l / d."""
    (report,) = (
        report
        for report in reports(launch, "Ascend910B2", compilers()[0].version, [SHAPE])
        if report.kernel == "compress_fwd"
    )
    tile = report.constexprs
    advance = tile["BR"] - tile["L"] + tile["S"]  # BT, however the configs choose it
    assert report.counts["dma"]["load"] == 2  # the tile, and the weights of a head
    assert tile["BR"] < advance * tile["L"] / tile["S"]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_legal_window_compiles_without_problems(dtype, version):
    shapes = [(dtype, 3, head_dim, *window) for window in WINDOWS for head_dim in (80, 256)]
    assert problems(launch, "Ascend910B4", version, shapes) == {}
