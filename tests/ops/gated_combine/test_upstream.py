"""The same kernels under upstream Triton: they compile for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import pytest
import torch

from tests.compiling import GPU, compile_for_hopper, no_upstream

if reason := no_upstream():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.gated_combine import launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("value_dim", [16, 80, 128, 520])
def test_every_kernel_compiles_for_hopper(value_dim, dtype):
    for planned in launch.compile_plans(GPU, dtype, 4, value_dim, torch.float32):
        assert ".target sm_90" in compile_for_hopper(planned), planned.kernel.__name__
