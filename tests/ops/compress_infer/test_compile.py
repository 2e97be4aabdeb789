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

from nsa_triton.ops.compress_infer import launch


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
    shapes = [*worst_shapes(), *small_shapes()]
    assert problems(launch, chip_name, version, shapes) == {}


def test_the_kernel_uses_the_vector_cores_only():
    """The launcher starts one program per vector core: a dot would need cube cores instead."""
    (report,) = reports(launch, "Ascend910B2", compilers()[0].version, [(torch.bfloat16, 4, 128, 32, 16, 64)])
    assert report.mix_mode == "aiv"


def test_a_piece_is_one_page_id_and_two_copies():
    """Tokens and weights come in by one copy each; lengths, page ids and slots are the only scalar loads."""
    (report,) = reports(launch, "Ascend910B2", compilers()[0].version, [(torch.bfloat16, 4, 128, 32, 16, 64)])
    assert report.counts["dma"]["load"] == 2
    assert report.counts["dma"]["store"] == 1
    assert {access.kind for access in report.scalar_accesses} == {"gm"}
    assert len(report.scalar_accesses) == 3
