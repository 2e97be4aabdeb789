"""The same kernels under upstream Triton: they compile for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import pytest
import torch

from tests.compiling import GPU, compile_for_hopper, no_upstream

if reason := no_upstream():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.compress import launch

SHAPES = [(32, 16, 128), (48, 32, 192), (128, 112, 80), (16, 16, 16)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("block", "stride", "head_dim"), SHAPES)
def test_every_kernel_compiles_for_hopper(block, stride, head_dim, dtype):
    for planned in launch.compile_plans(GPU, dtype, 4, head_dim, block, stride):
        assert ".target sm_90" in compile_for_hopper(planned), planned.kernel.__name__
