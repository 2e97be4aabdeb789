"""Every shipped config compiles for the chips, with both Ascend compilers, and nothing speaks against it."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers
from tests.compiling import CHIPS, VERSIONS, no_ascend, problems, reports
from tests.ops.compiled import FirstCaseCompiles

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.sliding_window_attention import launch
from nsa_triton.ops.sliding_window_attention.cases import COMPILES

# The largest sizes of the entries of the shipped file: dtype, heads, kv heads, key and value head size, window.
WORST = [
    (torch.bfloat16, 2, 1, 192, 128, 512),
    (torch.bfloat16, 2, 1, 256, 256, 512),
    (torch.bfloat16, 2, 1, 512, 256, 512),
    (torch.float32, 2, 1, 128, 128, 512),
    (torch.float32, 2, 1, 192, 128, 512),
    (torch.float32, 2, 1, 256, 256, 512),
    (torch.float32, 2, 1, 512, 256, 512),
    (torch.bfloat16, 2, 1, 512, 512, 512),
    (torch.float32, 2, 1, 512, 512, 512),
]


class TestCompile(FirstCaseCompiles):
    launch = launch
    cases = COMPILES


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("chip_name", CHIPS)
def test_every_shipped_config_compiles_without_problems(chip_name, version):
    assert problems(launch, chip_name, version, WORST) == {}


def test_products_are_made_on_the_cube_and_nothing_else_is():
    found = reports(launch, "Ascend910B2", compilers()[0].version, COMPILES[:1])
    modes = {report.kernel: report.mix_mode for report in found}
    assert {name for name, mode in modes.items() if mode == "mix"} == {"attention_fwd", "attention_dq", "attention_dkv"}
    assert set(modes.values()) == {"mix", "aiv"}
