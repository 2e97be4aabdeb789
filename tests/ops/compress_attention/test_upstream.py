"""The same kernels under upstream Triton: they compile for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import pytest
import torch

from tests.compiling import GPU, compile_for_hopper, no_upstream

if reason := no_upstream():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.compress_attention import launch

# heads, kv heads, head sizes, window, stride, block, K, causal, masked
SHAPES = [
    (64, 4, 192, 128, 32, 16, 64, 16, True, False),
    (10, 2, 65, 18, 48, 32, 96, 5, False, True),
    (4, 4, 64, 64, 16, 16, 16, 8, True, False),
    (8, 2, 80, 48, 64, 16, 64, 4, False, False),
]


# Upstream Triton multiplies float32 matrices out: that takes minutes to compile for the larger tiles.
CASES = [(shape, torch.bfloat16) for shape in SHAPES] + [(SHAPES[2], torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
def test_every_kernel_compiles_for_hopper(shape, dtype):
    for planned in launch.compile_plans(GPU, dtype, *shape):
        assert ".target sm_90" in compile_for_hopper(planned), planned.kernel.__name__
