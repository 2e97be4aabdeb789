"""The same kernel under upstream Triton: it compiles for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import pytest
import torch

from tests.compiling import GPU, compile_for_hopper, no_upstream

if reason := no_upstream():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.compress_infer import launch

# window, stride, page, head size
SHAPES = [(32, 16, 64, 128), (48, 48, 48, 100), (128, 128, 128, 600), (32, 16, None, 192)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("block", "stride", "page", "size"), SHAPES)
def test_the_kernel_compiles_for_hopper(block, stride, page, size, dtype):
    for planned in launch.compile_plans(GPU, dtype, 4, size, block, stride, page):
        assert ".target sm_90" in compile_for_hopper(planned)
