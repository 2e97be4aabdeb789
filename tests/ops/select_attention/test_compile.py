"""Every shipped config compiles for the chips, with both Ascend compilers, and nothing speaks against it."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers
from tests.compiling import no_ascend, reports
from tests.ops.compiled import ConfigsCompile, FirstCaseCompiles

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.select_attention import launch
from nsa_triton.ops.select_attention.cases import COMPILES

# The largest tiles of the shipped file, and tiles of many numbers of ids: dtype, heads, kv heads, key and value head
# size, block, blocks per token, causal.
WORST = [
    (dtype, heads, 1, key_dim, value_dim, 128, 16, True)
    for dtype in (torch.bfloat16, torch.float32)
    for heads in (1, 64)
    for key_dim, value_dim in ((192, 128), (256, 256))
] + [(torch.bfloat16, 16, 1, 192, 128, 64, count, True) for count in (1, 5, 9, 12, 24, 33, 64, 100, 128, 256)]


class TestCompile(ConfigsCompile, FirstCaseCompiles):
    launch = launch
    cases = COMPILES
    worst = WORST


def test_products_are_made_on_the_cube_and_nothing_else_is():
    found = reports(launch, "Ascend910B2", compilers()[0].version, COMPILES[:1])
    modes = {report.kernel.removeprefix("select_attention_"): report.mix_mode for report in found}
    assert {name for name, mode in modes.items() if mode == "mix"} == {"fwd", "dq", "dkv"}
    assert set(modes.values()) == {"mix", "aiv"}
