"""The same kernels under upstream Triton: they compile for a Hopper GPU, on a machine that need not have one."""

from __future__ import annotations

import pytest

from tests.compiling import GPU, compile_for_hopper, no_upstream

if reason := no_upstream():
    pytest.skip(reason, allow_module_level=True)

from nsa_triton.ops.sliding_window_attention import launch
from nsa_triton.ops.sliding_window_attention.cases import COMPILES


@pytest.mark.parametrize("shape", COMPILES, ids=str)
def test_every_kernel_compiles_for_hopper(shape):
    for planned in launch.compile_plans(GPU, *shape):
        assert ".target sm_90" in compile_for_hopper(planned), planned.kernel.__name__
