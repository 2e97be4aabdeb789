"""The same kernels under upstream Triton: they compile for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import pytest
import torch

from tests.compiling import GPU, compile_for_hopper, no_upstream

if reason := no_upstream():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.compress_attention_infer import launch

# batches, heads, kv heads, head sizes, window, stride, block, K, page, query tokens, longest
SHAPES = [
    (4, 64, 4, 192, 128, 32, 16, 64, 16, 128, 1, 4096),
    (2, 8, 2, 80, 48, 48, 16, 80, 4, 48, 2, 1024),
    (1, 14, 1, 65, 18, 16, 16, 16, 9, 16, 1, 300),
    (2, 6, 2, 32, 32, 32, 16, 64, 5, 64, 3, 600),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_compiles_for_hopper(shape, dtype):
    for planned in launch.compile_plans(GPU, dtype, *shape):
        assert ".target sm_90" in compile_for_hopper(planned), planned.kernel.__name__
