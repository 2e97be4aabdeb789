"""Every shipped config compiles for the chips, with both Ascend compilers, and nothing speaks against it."""

from __future__ import annotations

import pytest
import torch

from nsa_triton.ascend.toolchain import compilers
from tests.compiling import CHIPS, VERSIONS, no_ascend, problems, reports
from tests.ops.compiled import CasesCompile, ConfigsCompile

if reason := no_ascend():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.select_attention_infer import launch
from nsa_triton.ops.select_attention_infer.cases import COMPILES

# For every entry of the shipped file the largest tiles it makes, with many splits and with one: dtype, batches, heads
# of the one group, key and value head size.
WORST = [
    (dtype, batch, 32, 1, key_dim, value_dim, 128, 16, 128, 4)
    for dtype in (torch.bfloat16, torch.float32)
    for batch in (1, 64)
    for key_dim, value_dim in ((256, 128), (256, 256), (512, 256))
]


class TestCompile(CasesCompile, ConfigsCompile):
    launch = launch
    cases = COMPILES
    worst = WORST


@pytest.mark.parametrize("version", VERSIONS)
def test_wide_values_fill_the_unified_buffer_and_compile(version):
    """As the notes of their configs say."""
    shapes = [(dtype, 64, 16, 1, 512, 512, 128, 16, 128, 1) for dtype in (torch.bfloat16, torch.float32)]
    found = problems(launch, CHIPS[0], version, shapes)
    assert all(problem.startswith("UB is") for of_kernel in found.values() for problem in of_kernel), found


def test_products_are_made_on_the_cube_and_the_splits_joined_on_the_vector_cores():
    found = reports(launch, "Ascend910B2", compilers()[0].version, COMPILES[:1])
    modes = {report.kernel: report.mix_mode for report in found}
    assert modes["paged_split"] == "mix"
    assert modes["paged_join"] == "aiv"
